"""Results of the finished cells, and the settings that the tuning seeds choose."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.loading import build
from trainer.config.schema import ConfigError

from .cell_config import cell_config, require_same
from .grid import Cell, StudyTask, task_sweep
from .outcome import gain_within_limits
from .recipes import RECIPES
from .studies import Beyond, Rung, Setting, Study


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
    planned: int  # runs, finished and due ones included
    chosen: Setting | None  # None while runs remain

    @property
    def done(self) -> int:
        """Finished runs."""
        return sum(map(len, self.gains.values()))


def tune(study: Study, task: StudyTask, method: str, out: Path) -> Tuning:
    """In stages over the tuning seeds, by gain within limits.

    The first seed is run with the whole sweep, and with the next values beyond it where the best settings lie on an
    edge; each further seed with the best settings so far only. Chosen is the best mean over all tuning seeds; where it
    lies on an edge of all that was tried, the next value is run on all of them.
    """
    rungs = study.tuning[:1] if task.recipe in study.tuned_once else study.tuning
    options, beyond = task_sweep(study, task), study.beyond.get(RECIPES[task.recipe].kind)
    gains: dict[Setting, list[float]] = {setting: [] for setting in options}

    def best(count: int | None) -> list[Setting]:
        return sorted(gains, key=lambda one: (len(gains[one]), sum(gains[one])), reverse=True)[:count]

    def measure(seed: int, settings: Sequence[Setting]) -> list[Cell]:
        """Collect the gains on a seed, -> the runs that it still needs."""
        due = []
        for cell in [Cell(task, method, setting, seed) for setting in settings]:
            result = read_result(cell, study, out)
            if result is None:
                due.append(cell)
            else:
                gains.setdefault(cell.setting, []).append(gain_within_limits(result["rows"], task.reward))
        return due

    def tuning(due: list[Cell], later: Sequence[Rung]) -> Tuning:
        planned = sum(map(len, gains.values())) + len(due) + sum(len(best(rung.settings)) for rung in later)
        return Tuning(gains, due, planned, None if due else best(1)[0])

    for number, rung in enumerate(rungs):
        later = rungs[number + 1 :]
        due = measure(rung.seed, best(rung.settings))
        if not due and number == 0 and later and beyond is not None:
            due = measure(rung.seed, next_settings(best(later[0].settings), options, beyond))
        if due:
            return tuning(due, later)
    while rungs and beyond is not None:
        further = [one for one in next_settings(best(1), list(gains), beyond) if one not in gains]
        due = [cell for rung in rungs for cell in measure(rung.seed, further)]
        if due:
            return tuning(due, ())
        if not further:
            break
    return tuning([], ())


LOWEST, HIGHEST, LARGEST = "the lowest learning rate", "the highest learning rate", "the largest KL weight"


def edges(setting: Setting, tried: Iterable[Setting]) -> list[str]:
    """The edges of what was tried that a setting lies on; a KL weight of 0 is the natural end and no edge."""
    tried = list(tried)
    rates = [one.learning_rate for one in tried if one.kl_weight == setting.kl_weight]
    found = []
    if min(rates) < max(rates):
        found += [LOWEST] if setting.learning_rate == min(rates) else []
        found += [HIGHEST] if setting.learning_rate == max(rates) else []
    weights = [one.kl_weight for one in tried if one.learning_rate == setting.learning_rate]
    if setting.kl_weight == max(weights) > 0:
        found.append(LARGEST)
    return found


def next_settings(settings: Sequence[Setting], sweep: Sequence[Setting], beyond: Beyond) -> list[Setting]:
    """The settings one value beyond the edges that `settings` lie on, where there is such a value."""
    found = []
    for setting in settings:
        larger = [weight for weight in beyond.kl_weights if weight > setting.kl_weight]
        further = {
            LOWEST: [replace(setting, learning_rate=beyond.lower_rate)],
            HIGHEST: [replace(setting, learning_rate=beyond.higher_rate)],
            LARGEST: [replace(setting, kl_weight=weight) for weight in larger[:1]],
        }
        found += [one for edge in edges(setting, sweep) for one in further[edge]]
    return found
