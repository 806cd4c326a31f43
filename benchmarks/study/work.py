"""Works through a grid, alone or in parallel with other processes: cells are locked, and locked cells are skipped."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from trainer.config.schema import ConfigError
from trainer.runs.folder import RunFolder

from .cells import Say, run_cell
from .grid import Cell, StudyTask, reported_cells, study_tasks, task_methods
from .studies import Study
from .tuning import read_result, tune

WAIT = 5.0  # seconds between two checks of cells that other processes hold
Item = TypeVar("Item")


def work(study: Study, out: Path, say: Say) -> None:
    """Run every unfinished cell: wave after wave of methods, and in each task after task."""
    for wave in study.waves:
        for task in study_tasks(study):
            names = [name for name in task_methods(study, task) if name in wave]
            share(
                lambda task=task, names=names: due_cells(study, task, names, out),
                lambda cell: run_if_free(cell, study, out, say),
            )


def due_cells(study: Study, task: StudyTask, methods: Sequence[str], out: Path) -> list[Cell]:
    """The runs of a task that can be started: of methods that are still tuned, then reported ones, by seed."""
    tuned, reported = [], []
    for method in methods:
        tuning = tune(study, task, method, out)
        tuned += tuning.due
        if tuning.chosen is not None:
            cells = reported_cells(study, task, method, tuning.chosen)
            reported += [cell for cell in cells if read_result(cell, study, out) is None]
    return tuned + sorted(reported, key=lambda cell: study.seeds.index(cell.seed))


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
    """(finished cells, all cells)."""
    done = total = 0
    for task in study_tasks(study):
        for method in task_methods(study, task):
            tuning = tune(study, task, method, out)
            total += tuning.planned + len(study.seeds)
            done += tuning.done
            if tuning.chosen is not None:
                cells = reported_cells(study, task, method, tuning.chosen)
                done += sum(read_result(cell, study, out) is not None for cell in cells)
    return done, total
