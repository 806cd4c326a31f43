"""Clock, peak memory and process of a measurement."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def device_clock(device: torch.device) -> float:
    """CPU seconds of this process, which others change by their use of caches only; on a GPU, wall-clock seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def peak_megabytes(device: torch.device) -> float:
    """Peak memory so far, in MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-6 if sys.platform == "darwin" else 1.024e-3)


def in_new_process(target: Callable[..., None], *args: Any) -> int | None:
    """Call `target` in a process whose peak memory is that of one measurement, -> its exit status."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode
