"""What every search begins with: the network made ready, and the clean pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from robench.attacks.base import Classifier, frozen
from robench.attacks.network import Network, Precision, in_micro_batches, searching
from robench.attacks.noise import image_ids
from robench.attacks.pool import Images
from robench.attacks.verify import full_precision


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an attack works with.

    Attributes:
        net: for the search. judge: the model itself, as `verify` is to call it.
        correct: (N,) bool, right on the clean image.
    """

    net: Network
    judge: Classifier
    images: Images
    correct: Tensor


@contextmanager
def prepared(
    precision: Precision, model: Classifier, x: Tensor, y: Tensor
) -> Iterator[Prepared]:
    """The model, frozen, in a precision mode, on images (N, C, H, W), N >= 1.

    The clean pass is in micro-batches always: what stands for the ranking of an image's targets
    must not depend on the other images.
    """
    padded = in_micro_batches(model)
    with frozen(model), searching(precision):
        with full_precision():
            logits = torch.cat([padded(part) for part in torch.split(x, 1024)])
        others = logits.scatter(1, y[:, None], -torch.inf)
        ranked = others.argsort(dim=1, descending=True, stable=True)[:, :-1]
        yield Prepared(
            net=Network(model, precision, x[:8]),
            judge=padded if precision == "ieee" else model,
            images=Images(x, y, ranked, image_ids(x)),
            correct=logits.argmax(1) == y,
        )


def auto_slots(net: Network, x: Tensor) -> int:
    """Units in flight: what fills the device, and no more units of one image than that takes.

    On a CPU 64 do: larger batches leave the cache. On a GPU the batch is the largest power of 2,
    up to 4096, whose step takes at most half of the free memory.
    """
    if x.device.type != "cuda":
        return max(16, min(64, len(x)))
    size, passes = 64, (net.forwards, net.backwards)
    while size < 4096:
        free, _ = torch.cuda.mem_get_info(x.device)
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        net.gradient(x[:1].expand(size, *x.shape[1:]).clone(), lambda logits: logits.logsumexp(1))
        used = torch.cuda.max_memory_allocated(x.device) - before
        if 2 * used > free / 2:  # twice the images would not fit
            break
        size *= 2
    net.forwards, net.backwards = passes
    return size
