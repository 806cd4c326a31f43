"""LoRA by forward hooks: they add up(down(x)) to a module's output and leave the module unmodified."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class LowRank:
    """up(down(x)) of one module; `part` = (first, count) of its output rows, None for all."""

    module: nn.Module
    down: nn.Parameter  # (r, in, ...)
    up: nn.Parameter  # (out, r, ...)
    part: tuple[int, int] | None = None
    scale: float = 1.0

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """Add scale up(down(x)) to the module's output, in place and in its precision."""
        x, down, up = (t.to(total.device, total.dtype) for t in (x, self.down, self.up))
        if isinstance(self.module, nn.Conv2d):
            m, axis = self.module, 1
            down = down.view(len(down), m.in_channels, *m.kernel_size)
            out = F.conv2d(F.conv2d(x, down, None, m.stride, m.padding, m.dilation), up.view(len(up), -1, 1, 1))
        else:
            transpose = up.flatten(1).t().contiguous()  # a CPU computes up's gradient faster so
            axis, out = -1, F.linear(x, down.flatten(1)) @ transpose
        part = total if self.part is None else total.narrow(axis, *self.part)
        part.add_(out, alpha=self.scale)


@contextmanager
def attached(layers: Sequence[LowRank], wanted: Callable[[LowRank], bool]) -> Iterator[None]:
    """Inside, each module adds the layers for which `wanted` is true at the time of the call."""
    by_module: dict[nn.Module, list[LowRank]] = defaultdict(list)
    for layer in layers:
        by_module[layer.module].append(layer)
    handles = [module.register_forward_hook(_hook(own, wanted)) for module, own in by_module.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(layers: list[LowRank], wanted: Callable[[LowRank], bool]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        active = [layer for layer in layers if wanted(layer)]
        if not active:
            return None
        wide = torch.promote_types(out.dtype, torch.float32)
        total = out.to(wide, copy=True)
        for layer in active:
            layer.add_to(total, args[0])
        return total.to(out.dtype)

    return hook
