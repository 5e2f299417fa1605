"""What does not fit into memory is done again in smaller batches."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robench.errors import RobenchError

# Of RuntimeErrors: the allocators of the CPU and of MPS, cuDNN and cuBLAS.
_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in _TEXTS)


class Batches:
    """How many images are looked at together: as many as asked for, or as fit into memory.

    Attributes:
        size: images at a time. halved: whether more were asked for.
    """

    def __init__(self, size: int) -> None:
        self.size, self.halved = size, False

    @contextmanager
    def fitted(self) -> Iterator[None]:
        """For a try with `size` images. If they do not fit, the block ends, and `size` is halved.

        Raises RobenchError if not even one image fits.
        """
        try:
            yield
            return
        except Exception as error:  # also the errors of a user's network
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # whoever called us still holds it
            if self.size == 1:
                raise RobenchError("out of memory with one image at a time: take a device with "
                                   "more, or a smaller network") from None
        # Here the error has let go of the tensors of the try.
        self.size, self.halved = self.size // 2, True
        torch.cuda.empty_cache()  # where there is one

    def __call__(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """function(*tensors) (N, ...), of tensors (N, ...), in as many parts as it takes."""
        parts: list[Tensor] = []
        done = 0
        while done < len(tensors[0]) or not parts:
            with self.fitted():
                parts.append(function(*(t[done : done + self.size] for t in tensors)))
                done += self.size
        return parts[0] if len(parts) == 1 else torch.cat(parts)
