"""`elsewhere`: a device that is not the CPU, for machines without one.

Its tensors are computed on the CPU, but no operation takes them together with the CPU's, where a
GPU would not. As a script this is the command line of robench, with a device `elsewhere:0`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
DEVICE = torch.device("cpu")  # what computes
aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default}


class Elsewhere(Tensor):
    """A tensor of the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=f"{NAME}:0")
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __format__(self, how: str) -> str:
        return format(self.inner, how)


class Dispatch(TorchDispatchMode):
    """Inside, what is created on the device is created here."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(op, args, kwargs or {})


def compute(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation. Raises RuntimeError where devices are mixed."""
    wanted = kwargs.get("device")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    here = any(isinstance(value, Elsewhere) for value in tensors)
    made_here = here if wanted is None else torch.device(wanted).type == NAME
    if not here and not made_here:
        return op(*args, **kwargs)
    if here:
        _check(op, args, tensors)
    if made_here and any(isinstance(v, torch.Generator) for v in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{op}: a generator of the CPU for numbers of {NAME}")
    inner = {key: DEVICE if key == "device" and value is not None else tree_map(unwrapped, value)
             for key, value in kwargs.items() if key != "pin_memory"}
    result = op(*tree_map(unwrapped, args), **inner)
    if _in_place(op) and not isinstance(result, list | tuple | None):
        return args[0]
    return tree_map(_wrapped, result) if made_here else result


def _check(op: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    others = [value for value in tensors if not isinstance(value, Elsewhere)]
    if op in _INDEXED and isinstance(args[0], Elsewhere):  # the CPU's indices are welcome
        others = [value for value in args[2:] if type(value) is Tensor]
    if op not in _COPIES and any(value.dim() for value in others):
        shapes = ", ".join(f"{value.device} {tuple(value.shape)}" for value in tensors)
        raise RuntimeError(f"{op}: tensors on several devices: {shapes}")


def _in_place(op: Any) -> bool:
    arguments = op._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and alias.is_write


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _wrapped(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, Tensor) else value


# What torch does without asking the mode


def _empty(size: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    return Elsewhere(torch.empty(size, dtype=dtype))


def _empty_strided(
    size: Any, stride: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any
) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    unwrapped(target).copy_(unwrapped(source))
    return target


_IMPLEMENTED: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty, "empty_strided": _empty_strided, "_copy_from": _copy_from,
    "_local_scalar_dense": lambda value: value.inner.item(),
}


class _Module:
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def is_bf16_supported(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def register() -> list[torch.library.Library]:
    """Make the device known to this process; keep what is returned."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library, rest = (torch.library.Library(space, "IMPL") for space in ("aten", "_"))
    for name, function in _IMPLEMENTED.items():
        library.impl(name, function, "PrivateUse1")
    # Autocast has no list of operations for this device: it changes nothing.
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return [library, rest]


if __name__ == "__main__":
    kept = register()
    from robench.benchmark.cli import main

    with Dispatch():
        main()
