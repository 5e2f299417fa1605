"""What every search begins with: the network made ready, and the clean pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from robench.attacks.base import Classifier, frozen
from robench.attacks.memory import Batches
from robench.attacks.network import Network, Precision, in_micro_batches, searching
from robench.attacks.noise import image_ids
from robench.attacks.pool import Images
from robench.attacks.verify import full_precision


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an attack works with.

    Attributes:
        net: for the search. judge: the model itself, as `verify` is to call it.
        predicted: (N,) the class that the clean image is taken for.
        correct: (N,) bool, right on the clean image.
        fingerprint: (64,) or less, the largest logits of the first images: the same weights may
            be used in another way.
    """

    net: Network
    judge: Classifier
    images: Images
    predicted: Tensor
    correct: Tensor
    fingerprint: Tensor


def clean_logits(model: Classifier, x: Tensor) -> Tensor:
    """Logits (N, K) of clean images, in full precision.

    In micro-batches always: who is right, and how an image's targets are ranked, must not
    depend on the other images.
    """
    padded = in_micro_batches(model)
    with frozen(model), full_precision():
        return torch.cat([padded(part) for part in torch.split(x, 1024)])


@contextmanager
def prepared(
    precision: Precision, model: Classifier, x: Tensor, y: Tensor, logits: Tensor | None = None
) -> Iterator[Prepared]:
    """The model, frozen, in a precision mode, on images (N, C, H, W), N >= 1.

    logits: (N, K) of `clean_logits`, where the caller has them.
    """
    padded = in_micro_batches(model)
    with frozen(model), searching(precision):
        logits = clean_logits(model, x) if logits is None else logits
        predicted = logits.argmax(1)
        others = logits.scatter(1, y[:, None], -torch.inf)
        ranked = others.argsort(dim=1, descending=True, stable=True)[:, :-1]
        net: Network | None = None
        sample = Batches(8)
        while net is None:
            with sample.fitted():
                net = Network(model, precision, x[: sample.size])
        yield Prepared(
            net=net,
            judge=padded if precision == "ieee" else model,
            images=Images(x, y, ranked, image_ids(x)),
            predicted=predicted,
            correct=predicted == y,
            fingerprint=logits[:64].amax(1),
        )


def auto_slots(net: Network, x: Tensor, units: int) -> int:
    """Units in flight: what fills the device, but not more than the `units` of the largest stage,
    and on a CPU few units of one image, which would be in vain once it falls.

    On a CPU 64 do: larger batches leave the cache. On a GPU the batch is the largest power of 2,
    up to 4096, whose step takes at most half of the free memory.
    """
    if x.device.type != "cuda":
        return max(16, min(64, len(x)))
    batches, passes = Batches(32), (net.forwards, net.backwards)
    with batches.fitted():
        while (batches.size < min(4096, units)
               and _takes(net, x, batches.size) < _free(x.device) / 4):
            batches.size *= 2  # which takes twice as much
    net.forwards, net.backwards = passes
    return batches.size


def _takes(net: Network, x: Tensor, size: int) -> int:
    """Bytes that a gradient of `size` images takes at its peak."""
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    net.gradient(x[:1].expand(size, *x.shape[1:]).clone(), lambda logits: logits.logsumexp(1))
    return torch.cuda.max_memory_allocated(x.device) - before


def _free(device: torch.device) -> int:
    """Bytes that the device and torch's cache still have."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
