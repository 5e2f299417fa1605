"""One training in several processes, one for each device, with the numbers of a single process.

    every process:   the same shuffled, augmented batch, of which it takes its rows
    random starts:   its rows of those of the whole batch
    batch-norm:      in train mode, the statistics of the whole batch, also while crafting
    loss:            the mean over the whole batch
    gradients:       summed over the processes as soon as they are there
    after_step:      on the whole batch, by every process alike

Weights, optimizers, averages and memory are thus equal everywhere; every process measures the
epoch for itself, and the first one writes files. Lightning Fabric finds the devices and connects
the processes. Its wrapper for networks is not used: a step passes several networks several times
and asks for gradients of images in between, which DistributedDataParallel does not allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from robench.defenses.base import Defense, Losses, Moment, Nets, Wrapper
from robench.defenses.keeping import Keeper
from robench.errors import UsageError
from robench.randomness import seeded


@dataclass(frozen=True)
class Team:
    """The processes that train together; this one is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def unite(self, nets: Nets) -> list[RemovableHandle]:
        """Give the networks the weights of the first process; from now on sum their gradients.

        Every gradient of a parameter is summed, whoever asks for it: a backward pass, or AWP.
        Returns what ends it.
        """
        if self.size == 1:
            return []
        with torch.no_grad():
            for net in nets.values():
                for value in (*net.parameters(), *net.buffers()):
                    value.copy_(_broadcast(value))
        return [p.register_hook(_summed) for net in nets.values()  # type: ignore[no-untyped-call]
                for p in net.parameters() if p.requires_grad]

    def split(self, defense: Defense, x: Tensor, y: Tensor) -> tuple[Defense, Tensor, Tensor]:
        """What this process does of a step on images (N, C, H, W) and labels (N,)."""
        if self.size == 1:
            return defense, x, y
        share = Share(self.rank, self.size, len(y), x.device)
        return Together(inner=defense, share=share, batch=(x, y)), x[share.rows], y[share.rows]


@dataclass(frozen=True)
class Share:
    """The rows of a batch of `n` images that a process works on.

    Where there are fewer images than processes, some work on an image that does not count, so
    that nobody waits for them.
    """

    rank: int
    size: int
    n: int
    device: torch.device

    @cached_property
    def counts(self) -> list[int]:
        """How many images of each process count."""
        bounds = [self.n * rank // self.size for rank in range(self.size + 1)]
        return [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]

    @property
    def counted(self) -> bool:
        return self.counts[self.rank] > 0

    @property
    def rows(self) -> slice:
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank]) if self.counted else slice(0, 1)

    @property
    def length(self) -> int:
        """Of the local batch."""
        return max(self.counts[self.rank], 1)

    @property
    def weight(self) -> float:
        """Of a mean over the local batch in that over the whole one."""
        return self.counts[self.rank] / self.n

    @cached_property
    def weights(self) -> Tensor:
        """(size, 1): of all processes."""
        return torch.tensor(self.counts, dtype=torch.float64, device=self.device)[:, None] / self.n

    def part_of(self, value: Tensor) -> Tensor:
        """What a value, see `Losses.seen`, adds to that of the whole batch."""
        if value.ndim < 2:
            return value * self.weight
        whole = value.new_zeros(self.n, *value.shape[1:])
        if self.counted:
            whole[self.rows] = value
        return whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Together(Wrapper):
    """A defense on the rows of one process, with the losses of the whole batch.

    batch: the images and labels of all processes.
    """

    kind: ClassVar[str] = "together"

    share: Share
    batch: tuple[Tensor, Tensor]

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        with WholeBatch(self.share):
            return self.inner.craft(nets, x, y)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        with WholeBatch(self.share):
            local = self.inner.loss(nets, x, x_adv, y)
        parts: Tensor = _Total.apply(torch.stack(list(local.parts.values())) * self.share.weight)
        seen = {name: _summed(self.share.part_of(value)) for name, value in local.seen.items()}
        return Losses(dict(zip(local.parts, parts.unbind(), strict=True)), seen)

    @contextmanager
    def perturbed(self, nets: Nets, objective: Callable[[Nets], Losses]) -> Iterator[None]:
        with self.inner.perturbed(nets, objective):
            yield

    def after_step(self, nets: Nets, x: Tensor, y: Tensor, losses: Losses) -> None:
        self.inner.after_step(nets, *self.batch, losses)


class WholeBatch(TorchFunctionMode):
    """Inside, some rows of a batch are treated as what they are, a part of it.

    torch.rand, randn, rand_like and randn_like, asked for a row per local image, draw for the
    whole batch and return the local rows. Batch-norm that is training takes mean and variance
    over the whole batch; it stays torch's layer, so weights and their names are the usual ones.
    Not covered: dropout, which draws for the local rows, and layers that look at other images
    in ways of their own.
    """

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        share, kwargs = self._share, kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(share, *args, **kwargs)
        if func in (torch.rand_like, torch.randn_like) and args[0].shape[:1] == (share.length,):
            return func(_larger(args[0], share.n), *args[1:], **kwargs)[share.rows]
        if func in (torch.rand, torch.randn):
            size = args[0] if args and isinstance(args[0], Sequence) else args
            if tuple(size[:1]) == (share.length,):
                return func((share.n, *size[1:]), **kwargs)[share.rows]
        return func(*args, **kwargs)


def _larger(x: Tensor, n: int) -> Tensor:
    """An empty batch of n with the shape and the layout of x: noise is drawn in that order."""
    channels_last = x.ndim == 4 and not x.is_contiguous()
    return torch.empty(
        (n, *x.shape[1:]), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _batch_norm(
    share: Share,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm of x (n, C, ...) over the batches of all processes.

    Mean and variance of each process come first, then those of all from them: the mean of the
    squares less the square of the mean would lose digits.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    var, mean = torch.var_mean(wide, [d for d in range(x.ndim) if d != 1], correction=0)
    own = torch.stack([mean, var])
    everyone: Tensor = _Exchange.apply(torch.stack(
        [own if rank == share.rank else torch.zeros_like(own) for rank in range(share.size)]
    ), share.counted)
    means, variances = everyone.unbind(1)  # (size, C) each
    share_of = share.weights.to(wide.dtype)
    mean = (share_of * means).sum(0)
    var = (share_of * (variances + (means - mean) ** 2)).sum(0)
    if running_mean is not None and running_var is not None:
        count = share.n * (x.numel() // x.shape[1] // share.length)
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    shape = (1, -1, *(1,) * (x.ndim - 2))
    normal = (wide - mean.view(shape)) * scale.view(shape)
    return (normal if bias is None else normal + bias.view(shape)).to(x.dtype)


class _Exchange(torch.autograd.Function):
    """The sum over the processes, of which each makes its own use: gradients are summed, too.

    Those of a process whose images do not count are left out.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, counted: bool) -> Tensor:
        ctx.counted = counted
        return _summed(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad if ctx.counted else torch.zeros_like(grad)), None


class _Total(torch.autograd.Function):
    """The sum over the processes, of which all make the same use: it counts once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _summed(value: Tensor) -> Tensor:
    """The sum over the processes. Fabric's own all_reduce would first wait at a barrier."""
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _broadcast(value: Tensor) -> Tensor:
    first = value.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(first, 0)
    return first


class ReadOnly:
    """The keeper of a process that does not lead: it goes on from the same state, keeps nothing."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def load_state(self) -> dict[str, Any] | None:
        return self._keeper.load_state()

    def save_state(self, state: dict[str, Any]) -> None:
        """The leader saves it."""

    def save_network(self, name: str, net: nn.Module, epoch: int) -> None:
        """The leader saves it."""


def check_splits(name: str, defense: Defense) -> None:
    """Try a defense on a few images, whole and in two parts.

    Raises UsageError if its loss is no mean over images, as one that compares them is not: then
    several processes would train another method.
    """
    classes, n, device = 4, 5, torch.device("cpu")
    with seeded(0, "splits"):
        nets: dict[str, nn.Module] = {
            role: nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()
            for role in (*defense.trained, *defense.given)
        }
        nets |= defense.memory(nets, classes)
        x, y = torch.rand(n, 1, 4, 4, dtype=torch.float64), torch.arange(n) % classes
        shares = [Share(rank, 2, n, device) for rank in range(2)]
        agree = all(_agree(defense.at(Moment(epoch, 10)), nets, x, y, shares) for epoch in (0, 9))
    if not agree:
        raise UsageError(f"{name} cannot be trained on several devices, its loss is no mean over "
                         "images: leave out --devices")


def _agree(defense: Defense, nets: Nets, x: Tensor, y: Tensor, shares: Sequence[Share]) -> bool:
    """Whether what the parts of a batch add up to is what the whole batch gives."""
    x_adv = defense.craft(nets, x, y)

    def values(share: Share) -> dict[str, Tensor]:
        rows = share.rows
        x_adv_rows = torch.cat([part[rows] for part in x_adv.chunk(len(x_adv) // len(x))])
        with seeded(0, "loss"), WholeBatch(share):
            losses = defense.loss(nets, x[rows], x_adv_rows, y[rows])
        return losses.parts | {f"seen {name}": value for name, value in losses.seen.items()}

    whole, parts = values(Share(0, 1, len(x), x.device)), [values(share) for share in shares]
    for name, wanted in whole.items():
        local = [(share, part[name]) for share, part in zip(shares, parts, strict=True)]
        if any(value.ndim > 1 and len(value) != share.length for share, value in local):
            return False
        added = [share.part_of(value) for share, value in local]
        if any(part.shape != wanted.shape for part in added) or not torch.allclose(
                torch.stack(added).sum(0), wanted, rtol=1e-6, atol=1e-9):
            return False
    return True
