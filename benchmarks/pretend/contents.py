"""Contents of small tensors of whole numbers on a pretended GPU, for models that look for tokens by a mask."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten
SMALL = 2**16
"""Elements of the largest tensor that is followed."""
GROWING = (aten.nonzero.default, aten.repeat_interleave.Tensor)
"""Operations whose output's shape depends on contents."""
FILLING = (
    aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default, aten.arange.default,
    aten.arange.start,
)  # fmt: skip
LIKE = (
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default,
)  # fmt: skip
"""Operations that look only at their input's shape."""
CALLER = {"device": "cpu", "pin_memory": None, "non_blocking": False}
"""Arguments of an operation that belong to the device."""


def contents(t: Tensor) -> Tensor | None:
    """The numbers of `t`, where they are known."""
    if t.is_floating_point() or t.is_complex() or t.numel() > SMALL:
        return None
    return getattr(t, "contents", None) if isinstance(t, FakeTensor) else t


def follow(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the operation gives, computed on the CPU if all its inputs are known; in-place operations change theirs."""
    options = {name: CALLER.get(name, value) for name, value in kwargs.items()}
    with torch.utils._python_dispatch._disable_current_modes():
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
