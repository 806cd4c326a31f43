"""How much memory a computation takes, found without doing it: tensors without contents, their sizes counted."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .contents import KnownContents


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that come into being inside, until they go, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """Leave out what was there before."""
        self.known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):  # tables that a model keeps beside its weights
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage(), counts=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):  # a view of a real tensor has a storage of its own here
                self._enter(tensor.untyped_storage(), counts=not func.is_view)
        return out

    def _enter(self, storage: Any, counts: bool = True) -> None:
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def pretended_mode(modules: list[nn.Module]) -> FakeTensorMode | None:
    """The mode that models of shapes alone were made in; None for models with weights."""
    weights = (t for m in modules for t in (*m.parameters(), *m.buffers()))
    return next((t.fake_mode for t in weights if isinstance(t, FakeTensor)), None)


@contextmanager
def shapes_only(mode: FakeTensorMode | None) -> Iterator[FakeTensorMode | None]:
    """Inside, tensors have no contents but small masks and positions; None: nothing changes."""
    with mode or nullcontext(), KnownContents(mode) if mode else nullcontext():
        yield mode


def peak_bytes(modules: list[nn.Module], compute: Callable[[], Any], pretend: bool = True) -> int:
    """The most bytes at a time that `compute` takes beyond the weights of `modules`; without `pretend` by doing it."""
    tracker = MemoryTracker()
    weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    fake = pretended_mode(modules) or FakeTensorMode(allow_non_fake_inputs=True)
    with shapes_only(fake) if pretend else nullcontext() as mode:
        kept = [t if isinstance(t, FakeTensor) else mode.from_tensor(t) for t in weights] if mode else weights
        for tensor in kept:
            tracker.ignore(tensor)
        with tracker, torch.autograd.set_multithreading_enabled(False):
            compute()
    return tracker.peak
