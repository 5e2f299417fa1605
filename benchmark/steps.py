"""steps: at which step of PGD the images of a network fall.

With steps of one length from one start, the first k iterates of a long run are those of PGD with k
steps. So one run, in which images that have fallen are left alone, gives the robust accuracy under
every number of steps, and nothing is attacked twice. The starts are those of the attack "pgd" of
the same seed: with 20 steps the images fall to the same iterates as under pgd-20.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import robench
from robench.attacks.ascent import Ascent
from robench.attacks.base import frozen, memory_format
from robench.attacks.memory import Batches
from robench.attacks.noise import StreamNoise, image_ids, stream_keys
from robench.attacks.objectives import ce
from robench.attacks.verify import full_precision, verify
from robench.benchmark.data import Images
from robench.benchmark.evaluate import BATCH
from robench.benchmark.kept import kept_survey
from robench.benchmark.sources import Network
from robench.benchmark.spec import RunSpec, digest
from robench.benchmark.surveys import Bench, attack_facts, write
from robench.errors import UsageError
from robench.files import pack_arrays, write_atomic
from robench.reports.record import Steps
from robench.reports.store import Results

LIMIT, STEPS = 1000, 100
LEG = 10  # steps between two looks at which images still stand
STANDS, CLEAN = -1, -2  # never fooled, and misclassified without an attack
Show = Callable[[float, str], None]  # share done in [0, 1], what to say about it


def over_steps(
    sources: Sequence[str], spec: RunSpec, steps: int = STEPS, *, zoo: Path = Path("models"),
    quiet: bool = True,
) -> Results:
    """Attack networks with PGD and write when their images fell to the reports in `spec.out`.

    Sources are given as for `eval`, or as runs. Finished networks are taken as they are. Other
    results in the folder stay. Returns all that the folder holds. Raises like `eval`.
    """
    if steps < 1:
        raise UsageError(f"steps must be >= 1, not {steps}")
    bench = Bench.create(sources, spec, LIMIT, zoo=zoo, quiet=quiet)
    found = (_steps(network, bench, steps) for network in bench.networks)
    return write(spec.out, "steps", found, _identity)


def _steps(network: Network, bench: Bench, steps: int) -> Steps:
    matrix, subject = bench.matrix, bench.subject(network, "steps")
    attack = Ascent(matrix.threat, steps, matrix.threat.eps / 4, "uniform")
    how, seed = attack_facts(attack), matrix.spec.seeds[0]
    name = digest({
        **how, "threat": str(matrix.threat), "data": bench.images.sha256(), "seed": seed,
        "network": [subject.weights, network.model], "robench": robench.__version__})
    path = subject.folder / f"{name}.json"
    kept = kept_survey(path, Steps, subject.fingerprint)
    if kept is not None:
        return kept.model_copy(update=subject.facts)
    began = time.perf_counter()
    with matrix.reporter.task(f"{subject.label}: {steps} steps of PGD") as update:
        fell_at = first_fooled(network.net, bench.images, attack, seed=seed, show=update,
                               batch_size=matrix.spec.batch_size or BATCH)
    found = Steps(
        **bench.survey(subject), **how, attack_seed=seed, seconds=time.perf_counter() - began,
        n_correct=int((fell_at != CLEAN).sum()),
        fell_at=tuple(np.bincount(fell_at[fell_at >= 0], minlength=steps + 1).tolist()),
    )
    write_atomic(path.with_suffix(".npz"), pack_arrays({"fell_at": fell_at}))
    write_atomic(path, found.model_dump_json(indent=1) + "\n")
    return found


def first_fooled(
    net: nn.Module, data: Images, attack: Ascent, *, seed: int = 0, batch_size: int = 500,
    show: Show = lambda share, text: None,
) -> npt.NDArray[np.int16]:
    """(N,) the first iterate of each image that fools the network, 0 the start; STANDS or CLEAN.

    Of iterates that `verify` does not confirm none counts.
    """
    device = next(net.parameters(), data.x).device
    found, batches = [], Batches(batch_size)
    with frozen(net), full_precision():
        for start in range(0, len(data), batch_size):
            x = data.x[start : start + batch_size].contiguous(memory_format=memory_format(net))
            y = data.y[start : start + batch_size].to(device)
            found.append(batches(partial(_of_batch, net, attack, seed), x.to(device), y))
            show(min(start + batch_size, len(data)) / len(data), "")
    fell_at: npt.NDArray[np.int16] = torch.cat(found).cpu().numpy().astype(np.int16)
    return fell_at


def _of_batch(net: nn.Module, attack: Ascent, seed: int, x: Tensor, y: Tensor) -> Tensor:
    threat = attack.threat
    with torch.no_grad():
        correct = net(x).argmax(1) == y
    fell_at = torch.where(correct, STANDS, CLEAN)
    rows = correct.nonzero().flatten()
    if not len(rows):
        return fell_at
    x_adv = threat.sample(x, StreamNoise(stream_keys(image_ids(x), seed, "pgd", 0)))
    for done in range(0, attack.steps, LEG):
        leg = replace(attack, steps=min(LEG, attack.steps - done))
        watch = _Watch(net, y[rows])
        x_adv[rows] = leg.maximize(watch, x[rows], x_adv[rows])
        fooled = watch.at >= 0
        if bool(fooled.any()):
            claims = rows[fooled]
            fooled[fooled.clone()] = verify(net, x[claims], watch.claimed[fooled], y[claims],
                                            threat).fooled
        fell_at[rows[fooled]] = done + watch.at[fooled]
        rows = rows[~fooled]
        if not len(rows):
            return fell_at
    fooled = verify(net, x[rows], x_adv[rows], y[rows], threat).fooled
    fell_at[rows[fooled]] = attack.steps
    return fell_at


class _Watch:
    """Cross-entropy, which notes the first iterate of each image that is misclassified.

    Attributes:
        at: (N,) its number, -1 without one. claimed: (N, C, H, W) the iterate itself.
    """

    def __init__(self, net: nn.Module, y: Tensor) -> None:
        self._net, self._y, self._calls = net, y, 0
        self.at = torch.full_like(y, -1)

    def __call__(self, z: Tensor) -> Tensor:
        if not self._calls:
            self.claimed = z.detach().clone()
        logits = self._net(z)
        new = (logits.argmax(1) != self._y) & (self.at < 0)
        self.at[new] = self._calls
        self.claimed[new] = z.detach()[new]
        self._calls += 1
        return ce(logits, self._y)


def _identity(one: Steps) -> tuple[object, ...]:
    """What a later measurement replaces."""
    return (one.source, one.weights_sha256, one.threat, one.attack, one.data_sha256,
            one.attack_seed)
