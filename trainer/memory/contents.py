"""What is known of tensors without contents: small masks and positions, for models that look for tokens by them."""

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
GROWING = (ops.nonzero.default, ops.repeat_interleave.Tensor)
"""Operations whose output's shape depends on contents."""
FILLING = (
    ops.zeros.default, ops.ones.default, ops.full.default, ops.scalar_tensor.default, ops.arange.default,
    ops.arange.start,
)  # fmt: skip
LIKE = (
    ops.zeros_like.default, ops.ones_like.default, ops.full_like.default, ops.new_zeros.default,
    ops.new_ones.default, ops.new_full.default,
)  # fmt: skip
"""Operations that look only at their input's shape."""
CALLER = {"device": "cpu", "pin_memory": None, "non_blocking": False}
"""Arguments of an operation that belong to the device."""


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
    if func in GROWING and known is not None:
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
    remember(fake, contents(t))
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
    if t.is_floating_point() or t.is_complex() or t.numel() > SMALL:
        return None
    return getattr(t, "contents", None) if isinstance(t, FakeTensor) else t


def known_result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the operation gives, computed on the CPU if all its inputs are known; in-place operations change theirs."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and func not in LIKE:
        return None
    options = {name: CALLER.get(name, value) for name, value in kwargs.items()}
    with _disable_current_modes():
        if func in LIKE:
            return func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **options)
        tensors = [t for t in tree_iter((args, options)) if isinstance(t, Tensor)]
        if (tensors or func in FILLING) and all(contents(t) is not None for t in tensors):
            known, options = tree_map_only(Tensor, contents, (args, options))
            return func(*known, **options)
    if func._schema.is_mutable:
        remember(args[0], None)
    return None


def remember(out: Any, known: Any) -> None:
    """Let the results of an operation know their contents; None: unknown."""
    pairs = zip(out, known or [None] * len(out), strict=True) if isinstance(out, (list, tuple)) else [(out, known)]
    for tensor, numbers in pairs:
        if isinstance(tensor, FakeTensor):
            tensor.contents = numbers  # pyright: ignore[reportAttributeAccessIssue]
