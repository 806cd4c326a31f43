"""TensorBoard events beside a run's own files."""

from pathlib import Path
from typing import Any

from ..config.schema import ConfigError
from ..loop.align import Update


def require_tensorboard() -> Any:
    """Its SummaryWriter. Raises ConfigError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "run.tensorboard is true, but TensorBoard is not installed. `pip install tensorboard`, or set it to false."
        ) from None
    return SummaryWriter


def make_board(folder: Path, done: int) -> Any:
    """A SummaryWriter for the updates after `done`, whose earlier events are hidden: a resume replaces them."""
    return require_tensorboard()(str(folder), purge_step=done + 1)


def write_board(board: Any, update: Update) -> None:
    """The metrics of an update that are single numbers, the mean of each reward, and what the guard measured."""
    for key, value in update.metrics.items():
        if isinstance(value, int | float):
            board.add_scalar(key, value, update.number)
        elif key in ("rewards", "held_out"):
            for name, mean in value.items():
                board.add_scalar(f"{key}/{name}", mean, update.number)
        elif key == "guard":
            for name in ("reward", "diversity", "distance"):
                board.add_scalar(f"guard/{name}", value[name], update.number)
