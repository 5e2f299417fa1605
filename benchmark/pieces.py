"""An attack of the pool on images that may not all be in memory: then piece by piece.

Noise belongs to the image, so the pieces change no verdict of the search. They are no shards
(see `parts`): a piece is as large as the memory, lives in one process, and what is kept of it is
the state of its search; a shard is as large as was asked for, a task of any machine, and kept as
the outcome with the counts of its passes. A shard may itself be searched in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from robench.attacks.base import Classifier
from robench.attacks.found import Found, Progress
from robench.attacks.search import Pooled, Search
from robench.benchmark.data import Images
from robench.benchmark.data.streams import Streamed


def found_by(
    attack: Pooled, model: Classifier, data: Images, clean: Tensor, *, seed: int,
    slots: int | None, state: Path | None, keep: bool, deadline: float | None,
    starts: Tensor | None, progress: Callable[[Progress], None],
) -> Found:
    """What became of the images; its `x_adv` are kept on request only.

    data: N images, not all in memory perhaps, that come on the network's device once they are
    there. clean: (N, K) their logits. The rest is as in `Search`.
    """
    x, device = data.x, data.x.device
    pieces = x.pieces() if isinstance(x, Streamed) else [slice(len(data))]
    parts: list[Found] = []
    for number, piece in enumerate(pieces):
        stood = sum(int(part.standing.sum()) for part in parts) + max(0, len(data) - piece.stop)

        def show(now: Progress, number: int = number, stood: int = stood) -> None:
            progress(replace(now, done=(number + now.done) / len(pieces), n=len(data),
                             standing=stood + now.standing))

        found = Search(
            attack, model, x[piece], data.y[piece], seed=seed, slots=slots, deadline=deadline,
            clean=clean[piece].to(device), keep=keep, progress=show,
            state=state and state.with_suffix(f".{number}.partial" if number else ".partial"),
            starts=None if starts is None else starts[piece].to(device)).run()
        parts.append(found if keep else replace(found, x_adv=found.x_adv[:0].clone()))
    return Found.joined(parts)
