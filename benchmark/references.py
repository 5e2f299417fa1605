"""What `parity` and `speed` share: networks to compare on, and the libraries to compare with."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from robench.attacks.adapters import Shield, allowed, isolated, logged_warnings
from robench.attacks.adapters.pyautoattack import PyAutoAttack
from robench.attacks.base import Classifier, make_attack
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import verify
from robench.benchmark.checks import check_logits
from robench.benchmark.evaluate import BATCH, Flags
from robench.benchmark.matrix import Matrix
from robench.benchmark.provenance import environment
from robench.benchmark.sources import load_network
from robench.benchmark.spec import AttackSpec
from robench.errors import UsageError

REFERENCE_BATCH = 250  # images that pyautoattack takes at a time unless told otherwise
TORCHATTACKS_PGD = {"Linf": "PGD", "L2": "PGDL2"}


def networks(matrix: Matrix, sources: Sequence[str], zoo: Path) -> Iterator[tuple[str, nn.Module]]:
    """Name and network of each source, all checked before the first is used."""
    found = [load_network(source, matrix.dataset, matrix.threat, model=matrix.spec.model, zoo=zoo,
                          reporter=matrix.reporter)
             for source in dict.fromkeys(sources)]
    for network in found:
        check_logits(network.net.to(matrix.device), matrix.probe, matrix.test.y)
    yield from ((network.source, network.net) for network in found)


def reference(
    model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int,
    part: str = "standard", batch_size: int = REFERENCE_BATCH,
) -> Tensor:
    """pyautoattack on images (N, C, H, W), as its users run it: what survives a part is packed
    into new batches for the next. Returns examples, where there is none the image.

    The parameters ask for gradients, as they do in a network that was loaded: nothing tells
    users to freeze them, and FAB's backward pass then fills them.

    part: "standard" or one of its parts.
    """
    made = cast(PyAutoAttack, make_attack(f"pyautoattack:{part}", threat, seed=seed))
    x = x.detach()
    with isolated(model, seed), _asking(model), logged_warnings("auto-attack"):
        attack = made._build(Shield(model, x), x.float(), seed)
        images = x.float().contiguous().clone()
        x_adv, _ = attack.run_standard_evaluation(images, y.clone(), batch_size=batch_size)
    return allowed(x_adv, x, threat)


@contextmanager
def _asking(model: Classifier) -> Iterator[None]:
    """All parameters ask for gradients; `frozen`, outside of this, restores their flags."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    before = [p.grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def fooled(model: Classifier, x: Tensor, x_adv: Tensor, y: Tensor, threat: ThreatModel) -> Flags:
    """(N,) which examples count: `verify`, batch by batch."""
    parts = zip(*(torch.split(t, BATCH) for t in (x, x_adv, y)), strict=True)
    verdicts = [verify(model, clean, adv, label, threat) for clean, adv, label in parts]
    flags: Flags = torch.cat([verdict.fooled for verdict in verdicts]).cpu().numpy()
    return flags


def torchattacks_pgd(threat: ThreatModel, steps: int) -> AttackSpec:
    """The PGD of torchattacks with the step size of ours. Raises UsageError: none in L1."""
    if threat.norm not in TORCHATTACKS_PGD:
        raise UsageError(f"torchattacks has no PGD in {threat.norm}")
    options = {"steps": steps, "alpha": threat.eps / 4, "random_start": True}
    return AttackSpec(name=f"torchattacks:{TORCHATTACKS_PGD[threat.norm]}", options=options)


def machine(device: torch.device) -> str:
    """Where numbers come from, in words."""
    facts = environment(device)
    return (f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
            f"robench {facts['robench']} {facts['commit']}".strip())


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys, as CSV; "" without rows."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
