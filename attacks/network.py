"""Network: the classifier as the search sees it, prepared once and counted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robench.attacks.base import Classifier, frozen, memory_format
from robench.attacks.folding import close, folded, in_bf16, look, repeats
from robench.attacks.fused import Fused, forked, fused
from robench.attacks.local import Change, Local, Proposals
from robench.attacks.memory import Batches
from robench.attacks.verify import full_precision
from robench.attacks.windows import separate

Objective = Callable[[Tensor], Tensor]  # logits (N, K) -> one number per image (N,)
Precision = Literal["exact", "bf16", "ieee"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# The one batch shape of `ieee`: kernels, and with them the last bits, depend on the shape.
MICRO_BATCH = 32
# With warn_only the memory-efficient kernel, torch's choice for float32 on a GPU, stays random.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
# torch's warning about products of matrices, unless CUBLAS_WORKSPACE_CONFIG was set before the
# first one of the process. They differ from run to run with several streams only: we have one.
_CUBLAS = "(?s)Deterministic behavior was enabled.*CuBLAS"
_SHORT = ", short of memory: "


class Network:
    """A frozen classifier whose gradients reach the images alone.

    exact: float32; convolutions with the batch-norm folded in and channels_last where a check
    on real images shows the same logits and gradients, at torch's default precision (TF32 on
    Ampere GPUs and later). bf16: the same in bfloat16, but for the last linear layer; only a
    way of searching, since `verify` confirms in float32. ieee: the model as it is, TF32 off,
    deterministic kernels, and every forward pass in micro-batches of one padded shape, so that
    no result depends on the batch. Use it inside `searching(precision)` and `frozen(model)`.

    Attributes:
        forwards, backwards: images passed so far; the padding of `ieee` is not counted.
        prepared: what was done to the model, and what did not fit, for the record.
        batch: images that a pass should have, for a stepper that has the choice; the pool's slots.
    """

    def __init__(self, model: Classifier, precision: Precision, sample: Tensor) -> None:
        """sample: (N, C, H, W) a few of the images, to check the prepared network on."""
        self.forwards = self.backwards = 0
        self.batch = 1
        self._model, self._steep, self.prepared = model, model, "as it is"
        self._micro = precision == "ieee"
        self._dtype: torch.dtype | None = torch.bfloat16 if precision == "bf16" else None
        if isinstance(model, nn.Module) and precision != "ieee":
            prepared = None
            with suppress(_Unlike):  # and let go of what it holds
                prepared = _prepared(model, self._dtype, sample, fuse=True)
            self._model, self._steep, self.prepared = prepared or _prepared(
                model, self._dtype, sample, fuse=False)
        elif not isinstance(model, nn.Module):
            self._dtype = None
        # Windows only in a copy of our own making, which is deterministic and no `ieee` network.
        self._ours = not self.prepared.startswith("as it is")
        self._format = memory_format(self._model)
        self._sample = sample[:1].to(self._dtype or sample.dtype)
        self._local: Local | None = None

    def fits(self, batch: int) -> None:
        """Take note that no more than `batch` images at a time fit into memory."""
        self.batch = batch
        self.prepared = f"{self.prepared.partition(_SHORT)[0]}{_SHORT}{batch} at a time"

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W); no graph is built."""
        with torch.no_grad():
            return self._logits(self._model, self._chunks(x), len(x), x.dtype)

    def near(self, change: Change, proposals: Proposals) -> Tensor:
        """Logits of the proposals, for less work where they differ in a small square from known
        images.

        The arguments are those of `Local.logits`. Only a folded network on a CPU uses them.
        """
        ours = self._ours and isinstance(self._model, fx.GraphModule)
        if change.key.device.type != "cpu" or not ours:
            return self.logits(proposals.images(slice(None)))
        if self._local is None:
            self._local = Local(cast(fx.GraphModule, self._model), self._sample)
        self.forwards += len(change.key)
        with torch.no_grad():
            logits = self._local.logits(change, proposals)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def gradient(self, x: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (N, K), objective(logits) (N,), its gradient (N, C, H, W)), detached.

        The objective maps logits to one number per image. A gradient that is not finite is 0.
        """
        (found,) = self.gradients(x, lambda classes: [objective])
        return found

    def gradients(
        self, x: Tensor, objectives: Callable[[int], Sequence[Objective]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Like `gradient` for several objectives, given the number of classes: one forward pass,
        and a backward pass for each."""
        chunks = [chunk.detach().requires_grad_(True) for chunk in self._chunks(x)]
        with torch.enable_grad():
            logits = self._logits(self._steep, chunks, len(x), x.dtype)
        wanted = objectives(logits.shape[1])
        for left, objective in reversed(list(enumerate(reversed(wanted)))):
            with torch.enable_grad():
                values = objective(logits)
                grads = torch.autograd.grad(values.sum(), chunks, retain_graph=left > 0)
            self.backwards += len(x)
            grad = torch.cat(grads)[: len(x)] if len(grads) > 1 else grads[0][: len(x)]
            grad = grad.to(x.dtype).contiguous()
            yield logits.detach(), values.detach(), grad.nan_to_num(0.0, 0.0, 0.0)

    def _logits(
        self, model: Classifier, chunks: list[Tensor], n: int, dtype: torch.dtype
    ) -> Tensor:
        self.forwards += n
        parts = [model(chunk) for chunk in chunks]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return logits[:n].to(dtype)

    def _chunks(self, x: Tensor) -> list[Tensor]:
        x = x.to(self._dtype or x.dtype).contiguous(memory_format=self._format)
        return list(_micro_batches(x)) if self._micro else [x]


@contextmanager
def searching(precision: Precision) -> Iterator[None]:
    """The global switches of a precision mode; restored afterwards."""
    if precision != "ieee":
        yield
        return
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    before, warn_only = (torch.are_deterministic_algorithms_enabled(),
                         torch.is_deterministic_algorithms_warn_only_enabled())
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with full_precision(), sdpa_kernel(_ATTENTION), warnings.catch_warnings():
            warnings.filterwarnings("ignore", _CUBLAS)
            yield
    finally:
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def in_micro_batches(model: Classifier) -> Classifier:
    """The model without gradients, each pass in padded batches of one shape, as in `ieee`; of a
    smaller one where that does not fit into memory."""
    fitting = Batches(MICRO_BATCH)

    @torch.no_grad()
    def logits(x: Tensor) -> Tensor:
        return torch.cat([fitting(model, part) for part in _micro_batches(x)])[: len(x)]

    return logits


def _micro_batches(x: Tensor) -> Iterator[Tensor]:
    for part in torch.split(x, MICRO_BATCH):
        missing = MICRO_BATCH - len(part)
        yield part if not missing else torch.cat([part, part[:1].expand(missing, *part.shape[1:])])


class _Unlike(Exception):
    """Fused kernels are missing here, or give other logits or gradients."""


def _prepared(
    model: nn.Module, dtype: torch.dtype | None, sample: Tensor, *, fuse: bool
) -> tuple[nn.Module, nn.Module, str]:
    """A faster network with the same logits, one with the same gradients, or the model itself;
    and what they are."""
    net, name = _faster(model, sample)
    ours = net is not model
    if dtype is not None:
        net = in_bf16(net if ours else copy.deepcopy(model), sample)
        sample, name = sample.to(dtype), f"{name}, bf16"
    steep = net
    if fuse and ours and isinstance(net, fx.GraphModule) and separate(net):
        net, steep = _fused(net, sample)
        if any(isinstance(layer, Fused) for layer in net.modules()):
            name = f"{name}, fused"
    return net, steep, name


def _fused(net: fx.GraphModule, sample: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The network itself with fused kernels, and one for gradients. Raises _Unlike."""
    sample = sample.contiguous(memory_format=torch.channels_last)
    tolerance = 5e-2 if sample.dtype == torch.bfloat16 else 1e-4
    logits, grad = look(net, sample)
    try:
        steep = forked(fused(net, sample))
        with torch.no_grad():  # where more may be written in place
            found = (net(sample), *look(steep, sample))
    except Exception as error:  # a torch without these kernels
        raise _Unlike from error
    if not all(map(close, found, (logits, logits, grad), [tolerance] * 3)):
        raise _Unlike
    return net, steep


def _faster(model: nn.Module, sample: Tensor) -> tuple[nn.Module, str]:
    with frozen(model), full_precision():
        wanted = look(model, sample)
        # Tracing would freeze one draw of a randomized network, which flatters it.
        if not repeats(model, sample, wanted[0]):
            return model, "as it is: randomized"
        for name, prepare in (("batch-norm folded, channels_last", _folded),
                              ("channels_last", copy.deepcopy)):
            try:
                net = prepare(model).eval().requires_grad_(False)
                net = net.to(memory_format=torch.channels_last)
                got = look(net, sample.contiguous(memory_format=torch.channels_last))
            except Exception:  # control flow that fx cannot trace, modules that cannot be copied
                continue
            if close(got[0], wanted[0], 1e-4) and close(got[1], wanted[1], 1e-2):
                return net, name
    return model, "as it is"


def _folded(model: nn.Module) -> nn.Module:
    traced, folds = folded(model)
    if not folds:
        raise ValueError("nothing to fold")
    return traced
