"""Results of the finished cells, and the settings that the tuning seeds choose."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.loading import build
from trainer.config.schema import ConfigError

from .cell_config import cell_config, evaluation_identity, require_same, require_same_evaluation
from .files import with_nan
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
    result = load_result(file)
    if "config" not in result:
        raise ConfigError(f"{file} has no configuration. Remove {folder}, or use another --out.")
    require_same(build(result["config"], str(file)), cell_config(cell, study, out), folder)
    evaluation = evaluation_identity(study, study.reads_tinyeval(cell.seed))
    require_same_evaluation(result.get("evaluation"), evaluation, folder)
    return result


def load_result(file: Path) -> dict[str, Any]:
    """Content of a result.json; measures that a diverged run does not have are NaN."""
    result = json.loads(file.read_text(encoding="utf-8"))
    return {**result, "rows": with_nan(result.get("rows", []))}


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


@dataclass
class TuningRuns:
    """A method's tuning runs in a task, and the gains of those that have been read."""

    study: Study
    task: StudyTask
    method: str
    out: Path
    gains: dict[Setting, list[float]]  # in the order in which settings come to be tried

    def best(self, count: int | None) -> list[Setting]:
        """The settings with the most seeds, of these the ones with the highest mean gain; all of them for None."""
        return sorted(self.gains, key=lambda one: (len(self.gains[one]), sum(self.gains[one])), reverse=True)[:count]

    def read(self, seed: int, settings: Sequence[Setting]) -> list[Cell]:
        """Add the gains of the settings on a seed, -> the runs that are not finished."""
        due = []
        for cell in [Cell(self.task, self.method, setting, seed) for setting in settings]:
            result = read_result(cell, self.study, self.out)
            if result is None:
                due.append(cell)
            else:
                gain = gain_within_limits(result["rows"], self.task.reward)
                self.gains.setdefault(cell.setting, []).append(gain)
        return due


def tune(study: Study, task: StudyTask, method: str, out: Path) -> Tuning:
    """How far a method is tuned, by gain within limits: successive halving, then an extension beyond the edges.

    Chosen is the best mean over all tuning seeds.
    """
    rungs = study.tuning[:1] if task.recipe in study.tuned_once else study.tuning
    beyond = study.beyond.get(RECIPES[task.recipe].kind)
    runs = TuningRuns(study, task, method, out, {setting: [] for setting in task_sweep(study, task)})
    due, later = halve(runs, rungs, beyond)
    if not due and beyond is not None:
        due = extend(runs, rungs, beyond)
    planned = sum(map(len, runs.gains.values())) + len(due) + sum(len(runs.best(rung.settings)) for rung in later)
    return Tuning(runs.gains, due, planned, None if due else runs.best(1)[0])


def halve(runs: TuningRuns, rungs: Sequence[Rung], beyond: Beyond | None) -> tuple[list[Cell], Sequence[Rung]]:
    """The runs that come next, and the rungs after theirs: each rung is run with the best settings of those before.

    Successive halving, Jamieson and Talwalkar 2016 (arXiv 1502.07943), with seeds as the resource. The first rung has
    the whole sweep, and the next values beyond it where the settings that it passes on lie on an edge.
    """
    sweep = list(runs.gains)
    for number, rung in enumerate(rungs):
        later = rungs[number + 1 :]
        due = runs.read(rung.seed, runs.best(rung.settings))
        if not due and number == 0 and later and beyond is not None:
            due = runs.read(rung.seed, next_settings(runs.best(later[0].settings), sweep, beyond))
        if due:
            return due, later
    return [], ()


def extend(runs: TuningRuns, rungs: Sequence[Rung], beyond: Beyond) -> list[Cell]:
    """The runs that come next on every rung's seed, beyond the edges of what was tried that the best one lies on."""
    while rungs and (further := new_settings(runs, beyond)):
        due = [cell for rung in rungs for cell in runs.read(rung.seed, further)]
        if due:
            return due
    return []


def new_settings(runs: TuningRuns, beyond: Beyond) -> list[Setting]:
    """The settings beyond the best one that have not been tried."""
    return [one for one in next_settings(runs.best(1), list(runs.gains), beyond) if one not in runs.gains]


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
