"""Works off a grid, alone or beside other processes: each cell has a lock, and a cell that is taken is passed over."""

import time
from contextlib import ExitStack
from pathlib import Path

from trainer.config import ConfigError
from trainer.run import RunFolder

from .cell import Say, run_cell
from .contenders import Form
from .grid import Cell, choose, read_result, reported_cells, tasks, tuning_cells

WAIT = 5.0  # seconds between two looks at cells that others are running


def work(form: Form, out: Path, say: Say) -> None:
    """Run every cell of every task that is not finished yet: tuning seeds first, then the reported ones."""
    for task in tasks(form):
        run_cells(tuning_cells(form, task), form, out, say)
        chosen = choose(form, task, out)
        assert chosen is not None
        run_cells(reported_cells(form, task, chosen), form, out, say)


def run_cells(cells: list[Cell], form: Form, out: Path, say: Say) -> None:
    """Run those that are free until all are finished, by this process or by others."""
    while missing := [cell for cell in cells if read_result(cell, out) is None]:
        done = [run_if_free(cell, form, out, say) for cell in missing]
        if not any(done):
            time.sleep(WAIT)


def run_if_free(cell: Cell, form: Form, out: Path, say: Say) -> bool:
    """Whether this process ran it; False where another one is at it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(RunFolder(cell.folder(out)).locked())
        except ConfigError:
            return False
        if read_result(cell, out) is None:
            run_cell(cell, form, out, say)
    return True


def progress(form: Form, out: Path) -> tuple[int, int]:
    """(finished cells, all cells)."""
    finished = total = 0
    for task in tasks(form):
        tuning = tuning_cells(form, task)
        chosen = choose(form, task, out)
        reported = reported_cells(form, task, chosen) if chosen else []
        total += len(tuning) + (len(reported) or len(form.seeds) * len({c.contender for c in tuning}))
        finished += sum(read_result(cell, out) is not None for cell in (*tuning, *reported))
    return finished, total
