"""One process or many: groups are shared out, scores gathered, gradients summed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch import distributed as dist

from ..config.schema import ConfigError

LOST = (
    "connection closed by peer", "connection reset by peer", "connection closed by remote peer", "connection refused",
    "broken pipe", "socket closed", "timed out waiting", "timeout caused pair closure",  # gloo and sockets
    "ncclremoteerror", "remote process exit", "collective operation timeout", "communicator was aborted",  # NCCL
)  # fmt: skip
"""Parts of the messages of collectives whose other process is gone, in lower case; other errors of theirs are not."""


def launched() -> int:
    """How many processes a launcher started for this run, by its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes if a launcher (`accelerate launch`, torchrun) started several, each on its own GPU."""
    if launched() < 2 or dist.is_initialized():
        return
    from accelerate import PartialState

    gpu = torch.cuda.is_available()
    PartialState(cpu=not gpu, backend="cpu:gloo,cuda:nccl" if gpu else "gloo")  # scores are gathered on the CPU


class ProcessLost(ConfigError):
    """Another process of a run ended, so that this one cannot go on."""


@contextmanager
def together() -> Iterator[None]:
    """Around a run of several processes: what a collective raises when another process is gone becomes one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_available() and dist.is_initialized() and is_lost(error)):
            raise
        rank = dist.get_rank()
        with suppress(RuntimeError):
            leave()
        raise ProcessLost(
            f"process {rank} ends, because another process of this run ended first; its message, or the system's log "
            "where it was killed, has the cause."
        ) from None


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    message = str(error).lower()
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or any(mark in message for mark in LOST)


def leave() -> None:
    """Part from the other processes after a run that ended well: threads still waiting abort the interpreter's exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """Rank and size of torch.distributed if it is initialised (by `accelerate launch`), else one process."""

    def __init__(self) -> None:
        self.many = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.many else 0
        self.size = dist.get_world_size() if self.many else 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, groups: int, together: int = 1) -> list[int]:
        """The groups of this process, contiguous; `together` neighbours are never separated."""
        parts = self.size * together
        if groups % parts:
            points = f" and {together} branch points" if together > 1 else ""
            raise ConfigError(
                f"rollout.prompts_per_update {groups} cannot be divided among {self.size} processes{points}. "
                f"Use a multiple of {parts}."
            )
        mine = groups // self.size
        return list(range(self.rank * mine, (self.rank + 1) * mine))

    def slice(self, count: int) -> slice:
        """This process's part of `count` gathered rows."""
        mine = count // self.size
        return slice(self.rank * mine, (self.rank + 1) * mine)

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, (B,) -> (N * B,)."""
        if not self.many:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.many:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Largest over processes, in place."""
        if self.many:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def min(self, values: Tensor) -> Tensor:
        """Smallest over processes, in place."""
        if self.many:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values
