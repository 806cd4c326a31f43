"""The phases of a run, for what a pretended GPU counts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.loop import align, update
from trainer.policy.diffusers_policy import DiffusersPolicy
from trainer.runs.folder import RunFolder

from .gpu import PretendGpu
from .patches import pretending

PHASES: dict[str, tuple[Any, str]] = {
    "prompts": (DiffusersPolicy, "encode"),
    "rollout": (align, "roll_out"),
    "decoding": (DiffusersPolicy, "decode"),
    "rewards": (align, "score"),
    "update": (align, "improve"),
    "step": (update, "step_terms"),
    "checkpoint": (RunFolder, "save"),
}
"""Phase -> the function whose calls it is; decoding is part of the rollout, and a step part of the update."""


@contextmanager
def pretend_run(shapes: FakeTensorMode | None = None, capacity: int | None = None) -> Iterator[PretendGpu]:
    """A pretended GPU that counts the phases of a run; `shapes` is the mode of weights without contents."""
    gpu = PretendGpu(shapes, capacity)
    with ExitStack() as stack:
        stack.enter_context(pretending(gpu))
        for name, (owner, function) in PHASES.items():
            stack.enter_context(patch.object(owner, function, counted(gpu, name, getattr(owner, function))))
        yield gpu


def counted(gpu: PretendGpu, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as a phase."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with gpu.phase(name):
            return function(*args, **kwargs)

    return call
