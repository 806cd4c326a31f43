"""Results of the finished cells, and the settings that the tuning seeds choose."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.loading import build
from trainer.config.schema import ConfigError

from .cell_config import cell_config, require_same
from .grid import Cell, StudyTask, method_settings, task_methods, tuning_task
from .kept_gain import kept_share, mean_kept_gain
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
class TuningResult:
    """Means of one setting over the finished tuning seeds."""

    seeds: int
    gain: float  # mean kept gain
    kept: float  # share of the base model's correct objects at the end


def tuning_results(study: Study, task: StudyTask, method: str, out: Path) -> dict[Setting, TuningResult]:
    """A method's settings with at least one finished tuning seed."""
    task, by_setting = tuning_task(study, task), {}
    for setting in method_settings(study, task, method):
        cells = [Cell(task, method, *setting, seed) for seed in study.tuning_seeds]
        results = [result for _, result in finished(cells, study, out)]
        if results:
            gains = [mean_kept_gain(result) for result in results]
            kept = [kept_share(result["rows"][-1], result["rows"][0]) for result in results]
            by_setting[setting] = TuningResult(len(results), sum(gains) / len(gains), sum(kept) / len(kept))
    return by_setting


def choose(study: Study, task: StudyTask, out: Path) -> dict[str, Setting] | None:
    """Each method's setting with the highest mean kept gain on the tuning seeds; None while cells are missing."""
    chosen = {}
    for method in task_methods(study, task):
        options = method_settings(study, task, method)
        results = tuning_results(study, task, method, out)
        if not study.tuning_seeds:
            chosen[method] = options[0]
            continue
        if len(results) < len(options) or any(one.seeds < len(study.tuning_seeds) for one in results.values()):
            return None
        chosen[method] = max(options, key=lambda setting: results[setting].gain)
    return chosen
