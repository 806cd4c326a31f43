"""PyTorch's autograd engine without a driver.

A build for CUDA asks the driver, at every backward pass, whether a GPU has a context, and fails where there is none.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.config.schema import ConfigError

HAS_CONTEXT = 4
"""Entry of hasPrimaryContext in the virtual table of ATen/detail/AcceleratorHooksInterface.h: two destructors, isBuilt
and isAvailable come before it (Itanium ABI)."""


@contextmanager
def without_driver() -> Iterator[None]:
    """Inside, this process answers "no" to that question itself. Nothing to do on other builds or with a driver."""
    if not torch.backends.cuda.is_built() or torch._C._cuda_getDeviceCount() > 0:
        yield
        return
    if sys.platform != "linux":
        raise ConfigError(
            "PyTorch is built for CUDA and finds no GPU. The pretended GPU runs with such a build on Linux only: use a "
            "CPU build of PyTorch."
        )
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    hooks = library._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(hooks()).value or 0
    address = table + HAS_CONTEXT * ctypes.sizeof(ctypes.c_void_p)
    entry = ctypes.c_void_p.from_address(address)
    page = address & ~(mmap.PAGESIZE - 1)
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 3):
        raise ConfigError(
            "The table of PyTorch's CUDA hooks cannot be changed on this system. Use a CPU build of PyTorch."
        )
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, device: False)
    before, entry.value = entry.value, ctypes.cast(no, ctypes.c_void_p).value
    try:
        yield
    finally:
        entry.value = before
