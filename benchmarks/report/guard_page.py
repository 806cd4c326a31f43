"""The page on the guard: what a run ends with, with and without it, on rewards that are easily hacked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from trainer.config.guard_section import GuardConfig
from trainer.config.loading import build, merge
from trainer.guard.limits import violation
from trainer.runs.folder import RunFolder

from ..markdown import format_interval, format_number, format_p_value, markdown_table
from ..study.guarded import GuardOutcome, guard_outcome
from ..study.methods import STUDY_METHODS
from ..study.outcome import Row, distance, gain, lost_diversity, tinyeval_curve
from ..study.recipes import STUDY_PROMPTS
from ..study.statistics import t_interval
from .collect import CellRun, StudyResults
from .comparison import corrected_p_values

GUARD_LIMITS: dict[str, dict[str, float]] = {"default": {}, "strict": {"tolerance": 0.4, "diversity_tolerance": 0.2}}
GUARD_INTRO = """\
The guard only measures until it stops a run, so one run that goes on is enough to compute what each set of limits
would have done, and what no guard does. A loss is that of a held-out reward ({held_out}), in standard deviations of
the base model's scores, or of diversity, as a share. The guard keeps the update with the highest reward within its
limits; where there is none, a run ends with its last one. It stops a run after {patience} measurements in a row
beyond the limits. "At one update" is the control: all runs of a row end with the evaluation nearest to the mean of
the updates that the guard keeps, known only in hindsight. The guard measures {images} images of {prompts} of
the training prompts, the tables {evaluated} images of all {of_prompts} from other noise, so an update that the guard
found within its limits may be beyond them here. On these prompts nearly all of the base model's images are right, so
few wrong ones are many standard deviations of tinyeval. Both methods train at a learning rate of {rate:g}, which was
not tuned. p-values test whether TinyEval of the guarded runs, on prompts that are never trained, is that of the base
model; they are corrected by Holm's method over the page."""

GUARD_TITLE = "The {} limits: {:g} standard deviations, {:g} % of diversity"

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

    def is_within(self, k: int) -> bool:
        """Whether an evaluation of the study is within the guard's limits."""
        rows, held_out = self.run.rows, self.run.result["config"]["reward"]["held_out"]
        lost: dict[str, float | None] = {reward: -gain(rows[k], rows[0], reward) for reward in held_out}
        return violation({**lost, "diversity": lost_diversity(rows)[k]}, self.guard) is None

    @property
    def change(self) -> float:
        """What TinyEval has changed since before training, in percentage points."""
        of = MEASURES[TESTED][1]
        return of(self.run, self.kept) - of(self.run, 0)

    @property
    def guards_share(self) -> float:
        """The guard's share of the model evaluations up to the update at which it stops the run, or to the last."""
        rows, stopped = self.run.rows, self.outcome.stopped
        row: Row = rows[-1] if stopped is None else next(row for row in rows if row["update"] >= stopped)
        return self.outcome.model_evaluations / (self.outcome.model_evaluations + row["model_evaluations"])


@dataclass(frozen=True)
class GuardedRuns:
    """A method's runs of a task, all seeds, without a guard and under each set of limits."""

    task: str
    method: str
    runs: list[CellRun]
    sides: dict[str, list[GuardedRun]]  # by the name of the limits

    @property
    def title(self) -> str:
        return STUDY_METHODS[self.method].title


def guarded_runs(results: StudyResults) -> list[GuardedRuns]:
    """The tasks and methods whose every seed is finished."""
    return [
        GuardedRuns(task.task.reward, name, runs, {limits: under_guard(runs, limits) for limits in GUARD_LIMITS})
        for task in results.tasks
        for name, runs in task.runs.items()
        if results.has_every_seed(task, name)
    ]


def under_guard(runs: list[CellRun], limits: str) -> list[GuardedRun]:
    """The runs under a guard that measures as theirs does, with other limits."""
    changed = {"guard": GUARD_LIMITS[limits]}
    return [GuardedRun(run, build(merge(run.result["config"], changed), str(run.folder)).guard) for run in runs]


def guard_page(results: StudyResults) -> str:
    study = results.study
    guards = {
        name: build({"guard": {**study.guard, **changed}}, "guard").guard for name, changed in GUARD_LIMITS.items()
    }
    guard, (setting,) = guards["default"], study.sweep["flow"]
    intro = GUARD_INTRO.format(
        held_out=" or ".join(study.held_out),
        patience=guard.patience,
        images=guard.prompts * guard.images,
        prompts=guard.prompts,
        evaluated=study.images,
        of_prompts=len(STUDY_PROMPTS),
        rate=setting.learning_rate,
    )
    every = guarded_runs(results)
    p = corrected_p_values(
        {
            (group.task, group.method, limits): [one.change for one in side]
            for group in every
            for limits, side in group.sides.items()
        }
    )
    promises = [
        f"## {GUARD_TITLE.format(name, one.tolerance, 100 * one.diversity_tolerance)}\n\n{promise_table(every, name)}"
        for name, one in guards.items()
    ]
    tables = [f"## Reward {one.task}, {one.title}\n\n{outcome_table(one, p)}" for one in every]
    return "\n\n".join(["# Do guarded runs stay within the limits?", intro, *promises, *tables])


def shared_end(side: Sequence[GuardedRun]) -> int:
    """The evaluation nearest to the mean of the kept updates: one end for all runs, known in hindsight only."""
    kept = [one.outcome.kept for one in side if one.outcome.kept is not None]
    updates = [row["update"] for row in side[0].run.rows]
    mean = sum(kept) / len(kept) if kept else updates[-1]
    return min(range(len(updates)), key=lambda k: abs(updates[k] - mean))


def promise_table(every: Sequence[GuardedRuns], limits: str) -> str:
    """By task and method, and of all runs: how many the guard stops, how many are within its limits, their gain."""
    sides = {f"{one.task}, {one.title}": one.sides[limits] for one in every}
    ends = {title: [(one, shared_end(side)) for one in side] for title, side in sides.items()}
    rows = [_promise_row(title, own) for title, own in ends.items()]
    if every:
        rows.append(_promise_row("all", [pair for own in ends.values() for pair in own]))
    head = ["reward, method", "stopped", "with a kept update", "which, mean"]
    head += [f"within the limits, {end}" for end in ("with the guard", "at one update", "without")]
    head += [f"gain, {end}" for end in ("with the guard", "at one update")]
    return markdown_table([*head, "the guard's share of model evaluations"], rows)


def _promise_row(title: str, ends: Sequence[tuple[GuardedRun, int]]) -> list[str]:
    """A row of runs, each with the evaluation that the control ends it with."""
    runs = [one for one, _ in ends]
    count, kept = len(runs), [one.outcome.kept for one in runs if one.outcome.kept is not None]
    sides = [[(one, one.kept) for one in runs], ends, [(one, one.last) for one in runs]]
    inside = [sum(one.is_within(k) for one, k in side) for side in sides]
    gained = [sum(one.run.gains[k] for one, k in side) / count for side in sides[:2]]
    return [
        title,
        f"{sum(one.outcome.stopped is not None for one in runs)} of {count}",
        f"{len(kept)} of {count}",
        format_number(sum(kept) / len(kept), 1) if kept else "-",
        *(f"{within} of {count}" for within in inside),
        *map(format_number, gained),
        f"{100 * sum(one.guards_share for one in runs) / count:.0f} %",
    ]


def outcome_table(group: GuardedRuns, p: dict[tuple[str, str, str], float]) -> str:
    """What a method's runs end with: the base model, without a guard, and with each set of limits."""
    rows = []
    for title, (digits, of) in MEASURES.items():
        base = format_number(sum(of(run, 0) for run in group.runs) / len(group.runs), digits)
        cells = [base, format_interval(t_interval([of(run, len(run.rows) - 1) for run in group.runs]), digits)]
        for limits, side in group.sides.items():
            cells.append(format_interval(t_interval([of(one.run, one.kept) for one in side]), digits))
            cells.append(format_p_value(p[group.task, group.method, limits]) if title == TESTED else "-")
        rows.append([title, *cells])
    sides = [title for limits in group.sides for title in (f"{limits} limits", "p")]
    return markdown_table(["", "base model", "without the guard", *sides], rows)
