"""corruptions: accuracy of networks on images that nobody attacked, but noise, blur and weather.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import robench
from robench.attacks.base import frozen, memory_format
from robench.attacks.memory import Batches
from robench.attacks.verify import full_precision
from robench.benchmark.checks import check_finite
from robench.benchmark.data import Images
from robench.benchmark.data.corrupted import corrupted
from robench.benchmark.data.streams import Streamed, half_of_memory
from robench.benchmark.evaluate import BATCH
from robench.benchmark.kept import discard, kept_survey
from robench.benchmark.sources import Network
from robench.benchmark.spec import RunSpec, digest
from robench.benchmark.surveys import Bench, write
from robench.files import pack_arrays, unpack_arrays, write_atomic
from robench.reports.record import Corruptions
from robench.reports.store import Results

Versions = Mapping[str, tuple[Images, ...]]  # by corruption, at severity 1, 2, ...


def over_corruptions(
    sources: Sequence[str], spec: RunSpec, root: Path | None = None,
    only: Sequence[str] = (), *, zoo: Path = Path("models"), quiet: bool = True,
) -> Results:
    """Measure accuracy on corrupted images and write it to the reports in `spec.out`.

    Sources are given as for `eval`, or as runs. `root` is the folder of the corrupted images, else
    spec.data_root; `only` names some of them. Finished networks are taken as they are, an
    interrupted one goes on after its last corruption. Other results in the folder stay. Returns
    all that the folder holds. Raises like `eval`, and UsageError for images that are not there.
    """
    bench = Bench.create(sources, spec, zoo=zoo, quiet=quiet)
    matrix = bench.matrix
    versions = corrupted(
        matrix.dataset.name, matrix.dataset.test, root or spec.data_root or Path("data"),
        room=spec.memory_limit or half_of_memory(matrix.device), download=spec.download,
        task=matrix.reporter.task, only=tuple(dict.fromkeys(only)))
    n = len(bench.images)
    versions = {name: tuple(images.take(n) for images in found)
                for name, found in versions.items()}
    with matrix.reporter.task("read the corrupted images") as update:
        hashes = {}
        for done, (name, found) in enumerate(versions.items()):
            update(done / len(versions), name)
            hashes[name] = [images.sha256() for images in found]
    made = (_corruptions(network, bench, versions, digest(hashes, 64))
            for network in bench.networks)
    return write(spec.out, "corruptions", made, _identity)


def _corruptions(
    network: Network, bench: Bench, versions: Versions, sha256: str
) -> Corruptions:
    matrix, subject = bench.matrix, bench.subject(network, "corruptions")
    name = digest({"clean": bench.images.sha256(), "data": sha256,
                   "network": [subject.weights, network.model], "robench": robench.__version__})
    path = subject.folder / f"{name}.json"
    kept = kept_survey(path, Corruptions, subject.fingerprint)
    if kept is not None:
        return kept.model_copy(update=subject.facts)
    state, size = path.with_suffix(".partial"), matrix.spec.batch_size or BATCH
    clean = right(network.net, bench.images, size)
    began = time.perf_counter()
    found, seconds = _unfinished(state, np.array(subject.fingerprint))
    with matrix.reporter.task(f"{subject.label}: corruptions") as update:
        for done, (corruption, images) in enumerate(versions.items()):
            update(done / len(versions), corruption)
            if corruption not in found:
                found[corruption] = tuple(right(network.net, one, size) for one in images)
                write_atomic(state, pack_arrays({
                    **found, "fingerprint": np.array(subject.fingerprint),
                    "seconds": np.array(seconds + time.perf_counter() - began)}))
    survey = bench.survey(subject) | {"threat": "", "data_sha256": sha256}
    made = Corruptions(
        **survey, attack="", attack_config={}, seconds=seconds + time.perf_counter() - began,
        clean=clean, right={corruption: found[corruption] for corruption in versions})
    write_atomic(path, made.model_dump_json(indent=1) + "\n")
    discard(state)
    return made


def _unfinished(
    state: Path, fingerprint: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
) -> tuple[dict[str, tuple[int, ...]], float]:
    """What an interrupted measurement knew: counts by corruption, and the seconds it took."""
    try:
        arrays = unpack_arrays(state, 2**20)
        seconds = float(arrays.pop("seconds"))
        if np.allclose(arrays.pop("fingerprint"), fingerprint, rtol=1e-3, atol=1e-3):
            return {name: tuple(counts.tolist()) for name, counts in arrays.items()}, seconds
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: begin anew
        pass
    return {}, 0.0


@torch.no_grad()
def right(net: nn.Module, images: Images, size: int = BATCH) -> int:
    """How many of the images the network classifies right, in eval mode and full precision.

    Raises UsageError for logits that are not finite.
    """
    device = next((p.device for p in net.parameters()), images.x.device)
    x, batches, count = images.x, Batches(size), 0
    parts = torch.split(torch.arange(len(images)), size)
    read = x.ahead(parts) if isinstance(x, Streamed) else (x[part] for part in parts)
    with frozen(net), full_precision():
        for part, pixels in zip(parts, read, strict=True):
            batch = pixels.to(device).contiguous(memory_format=memory_format(net))
            logits = check_finite(batches(net, batch))
            count += int((logits.argmax(1) == images.y[part].to(device)).sum())
    return count


def _identity(one: Corruptions) -> tuple[object, ...]:
    """What a later measurement replaces."""
    return one.source, one.weights_sha256, one.data_sha256
