"""A pretended GPU: tensors on "cuda" have shapes, dtypes and devices but no contents; tensors on the CPU are real.

Operations across devices raise as on a GPU. Memory, waits, transfers and operations are counted by phase. A number that
comes back from the GPU is made up, but finite, unless it follows from known masks and positions. Models
whose weights are shapes on the CPU too take no memory at all.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trainer.memory.contents import SCALARS, contents, followed, lift

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]
ROUNDING = 512  # PyTorch's allocator rounds up to it
MASKS = (aten.nonzero.default, aten.masked_select.default)
CASTS = (aten._to_copy.default, aten.to.dtype)
NO_KERNEL = ("detach", "alias", "device", "lift", "empty", "_unsafe_view", "_reshape_alias", "new_empty")


@dataclass
class Traffic:
    """What one phase did."""

    calls: int = 0
    peak: int = 0  # bytes on the GPU
    launches: int = 0  # kernels, at least
    casts: int = 0  # of them, copies to another dtype
    waits: Counter[str] = field(default_factory=Counter)  # the CPU waits for the GPU, by place
    blocking: Counter[str] = field(default_factory=Counter)  # uploads for which the CPU waits, by place
    uploads: int = 0  # pinned ones, which the CPU does not wait for
    moved: int = 0  # bytes of modules that came to the GPU


class PretendGpu(TorchDispatchMode):
    """Inside, everything on "cuda" happens on the pretended GPU; `patches.pretending` tells torch that there is one."""

    def __init__(self, shapes: FakeTensorMode | None = None, capacity: int | None = None):
        super().__init__()
        self.capacity = capacity  # bytes; None: enough for everything
        self.shapes = shapes or FakeTensorMode(allow_non_fake_inputs=True)  # that of weights without contents
        self.phases: dict[str, Traffic] = {}
        self.total = Traffic()
        self.open = [self.total]
        self.now, self.moving = 0, False
        self.sizes: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.random = torch.Generator().manual_seed(0)

    @contextmanager
    def phase(self, name: str) -> Iterator[Traffic]:
        """Count what happens inside under `name`, too."""
        traffic = self.phases.setdefault(name, Traffic())
        traffic.calls += 1
        traffic.peak = max(traffic.peak, self.now)
        self.open.append(traffic)
        try:
            yield traffic
        finally:
            self.open.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs.values()))
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if func is aten._pin_memory.default:
            return self._pin(tensors[0])
        on_gpu = any(t.device.type == "cuda" for t in tensors) or (target is not None and target.type == "cuda")
        if not on_gpu and not any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        if func in SCALARS or func is aten.equal.default:
            return self._read(func, tensors[0])
        if func is aten._to_copy.default and target is not None:
            if target.type == "cpu" and tensors[0].device.type == "cuda" and not self.moving:
                self._wait("download")
                return self._downloaded(tensors[0], kwargs.get("dtype") or tensors[0].dtype)
            if target.type == "cuda" and tensors[0].device.type == "cpu":
                self._upload(tensors[0], bool(kwargs.get("non_blocking")))
                if isinstance(tensors[0], FakeTensor):
                    tensors[0].constant = None  # PyTorch knows a counter's number, and would upload it in earnest
        if func is aten.copy_.default and args[0].device != args[1].device:
            if args[1].device.type == "cuda":
                self._wait("download")
                return args[0].copy_(self._downloaded(args[1], args[0].dtype))
            self._upload(args[1], bool(args[2:] and args[2]))
        if on_gpu:
            self._count(func, args, tensors)
        if func.__name__.startswith("_fused_adam"):
            return None  # nothing is computed, and it returns nothing
        return followed(self.shapes, func, args, kwargs, lambda *given: self._shaped(func, given, kwargs))

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on shapes; a real tensor of the CPU enters as one without contents."""
        if not all(isinstance(t, FakeTensor) for t in tensors_in((args, kwargs.values()))):
            args, kwargs = tree_map_only(Tensor, self.lift, (args, kwargs))
        with self.shapes:
            out = func(*args, **kwargs)
        for t in tensors_in((out,)):
            if t.device.type == "cuda":
                self._allocate(t)
        return out

    def _count(self, func: Any, args: Any, tensors: Sequence[Tensor]) -> None:
        """Count a kernel, and the waits and uploads that are hidden in it; refuse tensors of several devices."""
        name = func.__name__
        if name.startswith(("_foreach", "_fused")) and len({t.device.type for t in tensors if t.ndim}) > 1:
            raise RuntimeError(f"{name}: its tensors are on several devices")
        if func in MASKS:
            self._wait(name)
        if func in (aten.index.Tensor, aten.index_put_.default) and args[0].device.type == "cuda":
            for index in args[1]:
                if index is not None and index.device.type == "cpu" and index.ndim:
                    self._upload(index, False)
                elif index is not None and index.dtype == torch.bool:
                    self._wait("index by a mask")
        if not func.is_view and not name.startswith(NO_KERNEL):
            for traffic in self.open:
                traffic.launches += 1
                traffic.casts += func in CASTS and not self.moving

    def _allocate(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self.now += self.sizes[key]
        for traffic in self.open:
            traffic.peak = max(traffic.peak, self.now)
        weakref.finalize(storage, self._free, key)
        if self.capacity is not None and self.now > self.capacity:
            raise torch.OutOfMemoryError(f"the pretended GPU has {self.capacity} bytes, of which {self.now} are needed")

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def _pin(self, t: Tensor) -> Tensor:
        pinned = t.clone()
        key = pinned.untyped_storage()._cdata
        self.pinned.add(key)
        weakref.finalize(pinned.untyped_storage(), self.pinned.discard, key)
        return pinned

    def _read(self, func: Any, t: Tensor) -> Any:
        if t.device.type == "cuda":
            self._wait(func.__name__)
        return True if func is aten.equal.default else self._downloaded(t, t.dtype).item()

    def _wait(self, what: str) -> None:
        for traffic in self.open:
            traffic.waits[f"{what} at {caller()}"] += 1

    def _upload(self, t: Tensor, non_blocking: bool) -> None:
        asynchronous = non_blocking and t.untyped_storage()._cdata in self.pinned
        for traffic in self.open:
            if self.moving:
                traffic.moved += t.nbytes
            elif asynchronous:
                traffic.uploads += 1
            else:
                traffic.blocking[f"{tuple(t.shape)} at {caller()}"] += 1

    def lift(self, t: Tensor) -> Tensor:
        return lift(self.shapes, t)

    def _downloaded(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        known = contents(t)
        return self.made_up(t.shape, dtype) if known is None else known.to(dtype, copy=True)

    def made_up(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the GPU would have computed is unknown: positive numbers below 1, True, or 1."""
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype)
        return (0.1 + 0.8 * torch.rand(shape, generator=self.random)).to(dtype)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments; a third of the time of torch's tree functions."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, type({}.values()))):
            found += tensors_in(value)
    return found


def caller() -> str:
    """The innermost line of this project, and that of a library below it."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        installed = "site-packages" in file.parts  # also where the environment lies in the project's folder
        if not installed and file.is_relative_to(ROOT) and not file.is_relative_to(Path(__file__).parent):
            return f"{file.relative_to(ROOT).as_posix()}:{frame.f_lineno}{library}"
        if not library and installed and "torch" not in file.parts:
            library = f" (in {file.parts[file.parts.index('site-packages') + 1]}, {file.name}:{frame.f_lineno})"
        frame = frame.f_back
    return "outside the project"
