"""Results of the finished cells, and the settings that the tuning seeds choose."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.loading import build
from trainer.config.schema import ConfigError

from .cell_config import cell_config, require_same
from .grid import Cell, StudyTask, task_sweep
from .outcome import gain_within_limits
from .studies import Setting, Study


def read_result(cell: Cell, study: Study, out: Path) -> dict[str, Any] | None:
    """Result of a finished cell, None if it is not finished. Raises ConfigError if it belongs to another run."""
    folder = cell.folder(out)
    file = folder / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if "config" not in result:
        raise ConfigError(f"{file} has no configuration. Remove {folder}, or use another --out.")
    require_same(build(result["config"], str(file)), cell_config(cell, study, out), folder)
    return result


def finished(cells: Sequence[Cell], study: Study, out: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """The finished cells with their results."""
    for cell in cells:
        result = read_result(cell, study, out)
        if result is not None:
            yield cell, result


@dataclass(frozen=True)
class Tuning:
    """How far the tuning of a method is in a task."""

    gains: dict[Setting, list[float]]  # of the finished seeds
    due: list[Cell]  # the runs that come next
    remaining: int  # runs, those included
    chosen: Setting | None  # None while runs remain


def planned_runs(study: Study, task: StudyTask) -> int:
    """Tuning runs of each method of a task."""
    return sum(min(rung.settings, len(task_sweep(study, task))) for rung in study.tuning)


def tune(study: Study, task: StudyTask, method: str, out: Path) -> Tuning:
    """Successive halving (Jamieson and Talwalkar, AISTATS 2016) over the tuning seeds, by gain within limits.

    Each further seed is run with the best settings so far only. Chosen is the best mean over all tuning seeds.
    """
    options = list(task_sweep(study, task))
    gains: dict[Setting, list[float]] = {setting: [] for setting in options}

    def mean(setting: Setting) -> float:
        return sum(gains[setting]) / max(1, len(gains[setting]))

    for number, rung in enumerate(study.tuning):
        options = sorted(options, key=mean, reverse=True)[: rung.settings]
        due = []
        for cell in [Cell(task, method, setting, rung.seed) for setting in options]:
            result = read_result(cell, study, out)
            if result is None:
                due.append(cell)
            else:
                gains[cell.setting].append(gain_within_limits(result["rows"], task.reward))
        if due:
            later = sum(min(rung.settings, len(gains)) for rung in study.tuning[number + 1 :])
            return Tuning(gains, due, len(due) + later, None)
    return Tuning(gains, [], 0, max(options, key=mean))
