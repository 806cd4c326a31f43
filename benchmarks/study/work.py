"""Works off a grid, alone or beside other processes: each cell has a lock, and a cell that is taken is passed over."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from trainer.config.schema import ConfigError
from trainer.runs.folder import RunFolder

from .cells import Say, run_cell
from .grid import (
    Cell,
    choose,
    common_settings,
    competing,
    fresh_cells,
    read_result,
    reported_cells,
    tasks,
    tuning_cells,
)
from .methods import Form

WAIT = 5.0  # seconds between two looks at work that others are doing
T = TypeVar("T")


def work(form: Form, out: Path, say: Say) -> None:
    """Run every cell that is not finished yet: each task's tuning seeds and reported ones, then one setting for all."""
    for task in tasks(form):
        run_cells(tuning_cells(form, task), form, out, say)
        chosen = choose(form, task, out)
        assert chosen is not None
        run_cells(reported_cells(form, task, chosen), form, out, say)
    for task in tasks(form):
        run_cells(reported_cells(form, task, common_settings(form, task)), form, out, say)
        run_cells(fresh_cells(form, task), form, out, say)


def run_cells(cells: list[Cell], form: Form, out: Path, say: Say) -> None:
    """Run those that are free until all are finished, by this process or by others."""
    share(
        lambda: [cell for cell in cells if read_result(cell, form, out) is None],
        lambda cell: run_if_free(cell, form, out, say),
    )


def share(missing: Callable[[], Sequence[T]], attempt: Callable[[T], bool]) -> None:
    """Attempt what is missing until nothing is; wait while all of it is taken by other processes."""
    while left := missing():
        done = [attempt(one) for one in left]
        if not any(done):
            time.sleep(WAIT)


def if_free(folder: Path, job: Callable[[], None]) -> bool:
    """Do `job` with the folder's lock; False where another process holds it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(RunFolder(folder).locked())
        except ConfigError:
            return False
        job()
    return True


def run_if_free(cell: Cell, form: Form, out: Path, say: Say) -> bool:
    """Whether this process ran it; False where another one is at it."""

    def job() -> None:
        if read_result(cell, form, out) is None:
            run_cell(cell, form, out, say)

    return if_free(cell.folder(out), job)


def progress(form: Form, out: Path) -> tuple[int, int]:
    """(finished cells, all cells); what is not chosen yet may turn out to be finished already."""
    cells, unknown = set(), 0
    for task in tasks(form):
        chosen = choose(form, task, out)
        cells.update(tuning_cells(form, task), reported_cells(form, task, chosen or {}))
        cells.update(reported_cells(form, task, common_settings(form, task)), fresh_cells(form, task))
        unknown += 0 if chosen else len(form.seeds) * len(competing(form, task))
    return sum(read_result(cell, form, out) is not None for cell in cells), len(cells) + unknown
