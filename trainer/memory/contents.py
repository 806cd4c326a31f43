"""What is known of tensors without contents: small masks and positions, for models that look for tokens by them."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

ops = torch.ops.aten
SMALL = 2**16
"""Elements of the largest tensor that is followed."""
SCALARS = (ops._local_scalar_dense.default, ops.item.default)
INDEXING = (ops.index.Tensor, ops.index_put_.default)
DATA_DEPENDENT = (ops.nonzero.default, ops.repeat_interleave.Tensor)
"""Operations whose output's shape depends on contents."""
FILLING = (
    ops.zeros.default, ops.ones.default, ops.full.default, ops.scalar_tensor.default, ops.arange.default,
    ops.arange.start,
)  # fmt: skip
SHAPE_ONLY = (
    ops.zeros_like.default, ops.ones_like.default, ops.full_like.default, ops.new_zeros.default,
    ops.new_ones.default, ops.new_full.default,
)  # fmt: skip
"""Operations that look only at their input's shape."""
CPU_OPTIONS = {"device": "cpu", "pin_memory": None, "non_blocking": False}
"""Arguments of an operation that belong to the device."""
OVERWRITTEN: set[int] = set()
"""Storages of contents that an unknown number was written to."""


class KnownContents(TorchDispatchMode):
    """Inside `shapes`, small tensors of whole numbers are computed beside their shapes, if their inputs are known."""

    def __init__(self, shapes: FakeTensorMode):
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = contents(args[0]) if func in SCALARS else None
        if known is not None:
            with _disable_current_modes():
                return known.item()
        return followed(self.shapes, func, args, kwargs or {}, lambda *given: func(*given, **(kwargs or {})))


def followed(shapes: FakeTensorMode, func: Any, args: Any, kwargs: dict[str, Any], compute: Any) -> Any:
    """The operation on shapes by `compute(*args)`, and its contents where those of its inputs are known."""
    known = known_result(func, args, kwargs)
    if func in INDEXING:
        args = (args[0], [i for index in args[1] for i in positions(shapes, index)], *args[2:])
    if func in DATA_DEPENDENT and known is not None:
        device = args[0].device
        with shapes:
            out = lift(shapes, known).to(device)
    else:
        out = compute(*args)
    remember(out, known)
    return out


def lift(shapes: FakeTensorMode, t: Tensor) -> Tensor:
    """A tensor without contents, as `t` on its device."""
    if isinstance(t, FakeTensor):
        return t
    fake = shapes.from_tensor(t)
    known = contents(t)
    remember(fake, None if known is None else known.clone())
    return fake


def positions(shapes: FakeTensorMode, index: Tensor | None) -> Sequence[Tensor | None]:
    """Where a mask is true: everywhere if nothing is known of it. Other indices stay."""
    if index is None or index.dtype != torch.bool:
        return [index]
    known = contents(index)
    mask = torch.ones(index.shape, dtype=torch.bool) if known is None else known
    with _disable_current_modes():
        places = mask.nonzero(as_tuple=True)
    with shapes:
        return [lift(shapes, place).to(index.device) for place in places]


def contents(t: Tensor) -> Tensor | None:
    """The numbers of `t`, where they are known."""
    if not is_followed(t):
        return None
    numbers = getattr(t, "contents", None) if isinstance(t, FakeTensor) else t
    return None if numbers is None or numbers.untyped_storage()._cdata in OVERWRITTEN else numbers


def is_followed(t: Tensor) -> bool:
    """Whether it is a small tensor of whole numbers."""
    return not (t.is_floating_point() or t.is_complex() or t.numel() > SMALL)


def known_result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the operation gives, computed on the CPU if all its inputs are known; in-place operations change theirs."""
    if not is_left_out(func, args, kwargs):
        options = {name: CPU_OPTIONS.get(name, value) for name, value in kwargs.items()}
        with _disable_current_modes():
            if func in SHAPE_ONLY:
                return func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **options)
            tensors = [t for t in tree_iter((args, options)) if isinstance(t, Tensor)]
            if (tensors or func in FILLING) and all(contents(t) is not None for t in tensors):
                known, options = tree_map_only(Tensor, contents, (args, options))
                return func(*known, **options)
    if func._schema.is_mutable:
        lose_contents(func, args, kwargs)
    return None


def is_left_out(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the result is random, uninitialised, floating-point or large."""
    if torch.Tag.nondeterministic_seeded in func.tags or func.__name__.startswith(("empty", "new_empty")):
        return True
    first, dtype = args[0] if args else None, kwargs.get("dtype")
    if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        return True
    if isinstance(first, Tensor):
        return first.numel() > SMALL or (first.is_floating_point() and (dtype is None or func not in SHAPE_ONLY))
    return isinstance(first, (list, tuple)) and func in FILLING and math.prod(first) > SMALL


def remember(out: Any, known: Any) -> None:
    """Attach contents to the results of an operation; None: unknown."""
    pairs = zip(out, known or [None] * len(out), strict=True) if isinstance(out, (list, tuple)) else [(out, known)]
    for tensor, numbers in pairs:
        if isinstance(tensor, FakeTensor):
            kept = numbers is not None and is_followed(numbers)
            tensor.contents = numbers if kept else None  # pyright: ignore[reportAttributeAccessIssue]


def lose_contents(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """What an operation writes to is unknown from now on, and so are its views and what it is a view of."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written = args[place] if place < len(args) else kwargs.get(argument.name)
            numbers = getattr(written, "contents", None)
            if numbers is not None:
                storage = numbers.untyped_storage()
                OVERWRITTEN.add(storage._cdata)
                weakref.finalize(storage, OVERWRITTEN.discard, storage._cdata)
