"""The page on the guard: what a run ends with, with and without it, on rewards that are easily hacked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from trainer.config.guard_section import GuardConfig
from trainer.config.loading import build, merge
from trainer.guard.limits import violation
from trainer.runs.folder import RunFolder

from ..study.guarded import GuardOutcome, guard_outcome
from ..study.methods import STUDY_METHODS
from ..study.outcome import Row, distance, gain, lost_diversity, tinyeval_curve
from ..study.statistics import t_interval
from .collect import CellRun, StudyResults, TaskResults
from .comparison import corrected_p_values
from .markdown import format_interval, format_number, format_p_value, markdown_table

LIMITS: dict[str, dict[str, float]] = {"default": {}, "strict": {"tolerance": 0.4, "diversity_tolerance": 0.2}}
GUARD_INTRO = """\
The guard only measures until it stops a run, so one run that goes on shows every outcome: without a guard, and with
its default limits or stricter ones. A loss is that of a held-out reward ({held_out}), in standard deviations of the
base model's scores, or of diversity, as a share. The guard keeps the update with the highest reward within its
limits; where there is none, a run ends with its last one. It stops a run after {patience} measurements in a row
beyond the limits. It measures 16 images, the tables {images}, of the same prompts and from other noise: an update
that the guard found within its limits may be beyond them here. p-values test, for the default limits, what the guard
does to TinyEval, and are corrected by Holm's method over the page."""

LIMITS_TITLE = "The {} limits: {:g} standard deviations, {:.0%} of diversity"

MEASURES: dict[str, tuple[int, Callable[[CellRun, int], float]]] = {  # title -> (digits, of a run's evaluation)
    "gain in the reward": (2, lambda run, k: run.gains[k]),
    "diversity left, %": (0, lambda run, k: 100 * (1 - lost_diversity(run.rows)[k])),
    "distance, x": (1, lambda run, k: distance(run.rows)[k]),
    "correct images, %": (0, lambda run, k: 100 * run.rows[k]["right"]),
    "TinyEval, hard tasks, %": (0, lambda run, k: 100 * tinyeval_curve(run.rows)[k]),
}
TESTED = "TinyEval, hard tasks, %"


@dataclass(frozen=True)
class GuardedRun:
    """A run, and a guard with limits that may not be those that it was run with."""

    run: CellRun
    guard: GuardConfig

    @cached_property
    def outcome(self) -> GuardOutcome:
        return guard_outcome(RunFolder(self.run.folder).records(), self.guard)

    @property
    def kept(self) -> int:
        """The evaluation of the update whose LoRA the run ends with: the kept one, or the last one if there is none."""
        update = self.outcome.kept or self.outcome.stopped
        return self.last if update is None else [row["update"] for row in self.run.rows].index(update)

    @property
    def last(self) -> int:
        """The run's last evaluation, without the guard."""
        return len(self.run.rows) - 1

    def largest_loss(self, k: int) -> float:
        """The largest loss at an evaluation, as a share of its limit."""
        limits = {"diversity": self.guard.diversity_tolerance}
        return max(loss / limits.get(name, self.guard.tolerance) for name, loss in self._losses(k).items())

    def is_within(self, k: int) -> bool:
        return violation(dict(self._losses(k)), self.guard) is None

    @property
    def guards_share(self) -> float:
        """The guard's share of the model evaluations up to the update at which it stops the run, or to the last."""
        rows, stopped = self.run.rows, self.outcome.stopped
        row: Row = rows[-1] if stopped is None else next(row for row in rows if row["update"] >= stopped)
        return self.outcome.model_evaluations / (self.outcome.model_evaluations + row["model_evaluations"])

    def _losses(self, k: int) -> dict[str, float]:
        rows, held_out = self.run.rows, self.run.result["config"]["reward"]["held_out"]
        lost = {reward: -gain(rows[k], rows[0], reward) for reward in held_out}
        return {**lost, "diversity": lost_diversity(rows)[k]}


def guarded(runs: list[CellRun], limits: str) -> list[GuardedRun]:
    """The runs under a guard that measures as theirs does, with other limits."""
    changed = {"guard": LIMITS[limits]}
    return [GuardedRun(run, build(merge(run.result["config"], changed), str(run.folder)).guard) for run in runs]


def guard_page(results: StudyResults) -> str:
    study = results.study
    guards = {name: build({"guard": {**study.guard, **changed}}, "guard").guard for name, changed in LIMITS.items()}
    intro = GUARD_INTRO.format(
        held_out=" or ".join(study.held_out), patience=guards["default"].patience, images=study.images
    )
    tested = {(task.task.name, name): _differences(task.runs[name]) for task, name in _rows(results)}
    p = corrected_p_values(tested.items())
    promises = [
        f"## {LIMITS_TITLE.format(name, one.tolerance, one.diversity_tolerance)}\n\n{promise_table(results, name)}"
        for name, one in guards.items()
    ]
    tables = [f"## Reward {task.task.reward}\n\n{outcome_table(task, p)}" for task in results.measured]
    return "\n\n".join(["# Does the guard stay within its limits?", intro, *promises, *tables])


def promise_table(results: StudyResults, limits: str) -> str:
    """By task and method: how many runs the guard stops, and how many are within its limits with and without it."""
    rows = []
    for task, name in _rows(results):
        runs = guarded(task.runs[name], limits)
        count = len(runs)
        inside = [sum(one.is_within(k) for one, k in _at(runs, kept)) for kept in (True, False)]
        largest = [max(one.largest_loss(k) for one, k in _at(runs, kept)) for kept in (True, False)]
        rows.append(
            [
                f"{task.task.reward}, {STUDY_METHODS[name].title}",
                f"{sum(one.outcome.stopped is not None for one in runs)} of {count}",
                format_number(sum(one.run.rows[one.kept]["update"] for one in runs) / count, 1),
                *(f"{within} of {count}" for within in inside),
                *(f"{loss:.1f} x" for loss in largest),
                f"{100 * sum(one.guards_share for one in runs) / count:.0f} %",
            ]
        )
    head = ["reward, method", "stopped", "update kept, mean", "within the limits with", "without"]
    head += ["largest loss, of its limit, with", "without", "the guard's share of model evaluations"]
    return markdown_table(head, rows)


def outcome_table(task: TaskResults, p: dict[tuple[str, str], float]) -> str:
    """What a run ends with: the base model, without a guard, and with each limits."""
    rows = []
    for name in task.measured:
        sides = {limits: guarded(task.runs[name], limits) for limits in LIMITS}
        for title, (digits, of) in MEASURES.items():
            ends = [of(run, len(run.rows) - 1) for run in task.runs[name]]
            kept = [[of(one.run, one.kept) for one in runs] for runs in sides.values()]
            columns = [format_interval(t_interval(values), digits) for values in (ends, *kept)]
            base = format_number(sum(of(run, 0) for run in task.runs[name]) / len(ends), digits)
            p_value = format_p_value(p[task.task.name, name]) if title == TESTED else "-"
            rows.append([f"{STUDY_METHODS[name].title}, {title}", str(len(ends)), base, *columns, p_value])
    head = ["", "seeds", "base model", "without the guard", *(f"{limits} limits" for limits in LIMITS)]
    return markdown_table([*head, "p (Holm)"], rows)


def _rows(results: StudyResults) -> Iterator[tuple[TaskResults, str]]:
    return ((task, name) for task in results.measured for name in task.measured)


def _at(runs: list[GuardedRun], kept: bool) -> Iterator[tuple[GuardedRun, int]]:
    return ((one, one.kept if kept else one.last) for one in runs)


def _differences(runs: list[CellRun]) -> list[float]:
    of = MEASURES[TESTED][1]
    return [of(one.run, one.kept) - of(one.run, one.last) for one in guarded(runs, "default")]
