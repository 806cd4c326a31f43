"""Works through a grid, alone or in parallel with other processes: cells are locked, and locked cells are skipped."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from trainer.config.schema import ConfigError
from trainer.runs.folder import RunFolder

from .cells import Say, run_cell
from .grid import Cell, common_settings, fresh_cells, reported_cells, study_tasks, task_methods, tuning_cells
from .studies import Study
from .tuning import choose, read_result

WAIT = 5.0  # seconds between two checks of cells that other processes hold
Item = TypeVar("Item")


def work(study: Study, out: Path, say: Say) -> None:
    """Run every unfinished cell: per task the tuning seeds, then the reported ones; then the common setting."""
    for task in study_tasks(study):
        run_cells(tuning_cells(study, task), study, out, say)
        chosen = choose(study, task, out)
        assert chosen is not None
        run_cells(reported_cells(study, task, chosen), study, out, say)
    for task in study_tasks(study):
        run_cells(reported_cells(study, task, common_settings(study, task)), study, out, say)
        run_cells(fresh_cells(study, task), study, out, say)


def run_cells(cells: list[Cell], study: Study, out: Path, say: Say) -> None:
    """Run unlocked cells until all are finished, by this process or by others."""
    share(
        lambda: [cell for cell in cells if read_result(cell, study, out) is None],
        lambda cell: run_if_free(cell, study, out, say),
    )


def share(missing: Callable[[], Sequence[Item]], attempt: Callable[[Item], bool]) -> None:
    """Attempt the missing items until none is left; wait while other processes hold all of them."""
    while items := missing():
        done = [attempt(item) for item in items]
        if not any(done):
            time.sleep(WAIT)


def if_free(folder: Path, job: Callable[[], None]) -> bool:
    """Do `job` while holding the folder's lock; False if another process holds it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(RunFolder(folder).locked())
        except ConfigError:
            return False
        job()
    return True


def run_if_free(cell: Cell, study: Study, out: Path, say: Say) -> bool:
    """Run a cell unless another process holds it, -> whether this process had the lock."""

    def job() -> None:
        if read_result(cell, study, out) is None:
            run_cell(cell, study, out, say)

    return if_free(cell.folder(out), job)


def progress(study: Study, out: Path) -> tuple[int, int]:
    """(finished cells, all cells); reported cells without a chosen setting are counted as unfinished."""
    cells, unknown = set(), 0
    for task in study_tasks(study):
        chosen = choose(study, task, out)
        cells.update(tuning_cells(study, task), reported_cells(study, task, chosen or {}))
        cells.update(reported_cells(study, task, common_settings(study, task)), fresh_cells(study, task))
        unknown += 0 if chosen else len(study.seeds) * len(task_methods(study, task))
    return sum(read_result(cell, study, out) is not None for cell in cells), len(cells) + unknown
