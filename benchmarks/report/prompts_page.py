"""The page on following prompts: TinyEval before and after training, on prompts that are never trained."""

from collections.abc import Sequence

from comfyui_pcpo.tiny.tinyeval import HARD

from ..study.methods import STUDY_METHODS
from ..study.outcome import Row, at_limits, tinyeval_curve
from ..study.recipes import FOLLOWING
from ..study.statistics import t_interval
from .collect import CellRun, StudyResults, TaskResults
from .comparison import corrected_p_values
from .markdown import format_interval, format_number, format_p_value, markdown_table

PROMPTS_INTRO = f"""TinyEval's hard tasks: {", ".join(HARD)}; 20 prompts each, one image per prompt from fixed noise,
none of their combinations trained. Numbers are per cent of correct images, means over seeds with Student's 95 %
interval. "Change" is that over the whole training, "within the limits" the change where diversity or distance reach
their limits. p-values test a change of 0 and are corrected by Holm's method over the page."""

TaskMethod = tuple[str, str]  # task and method


def prompts_page(results: StudyResults) -> str:
    """Tasks that train on following prompts first, then the side effects of the others."""
    family = corrected_p_values(
        ((task.task.name, name), [change(run) for run in task.runs[name]])
        for task in results.measured
        for name in task.measured
    )
    tasks = sorted(results.measured, key=lambda task: task.task.reward != FOLLOWING)
    tables = [f"## {task.task.title}\n\n{following_table(task, family)}" for task in tasks]
    return "\n\n".join(["# Does it follow prompts better?", PROMPTS_INTRO, *tables])


def following_table(task: TaskResults, p: dict[TaskMethod, float]) -> str:
    """TinyEval by method: all hard tasks before, their change, and each task after training."""
    base = next(iter(task.runs[task.measured[0]])).rows[0]
    rows = [["base model", "-", _percent(base, "hard tasks"), "-", "-", "-", *(_percent(base, t) for t in HARD)]]
    for name in task.measured:
        runs = task.runs[name]
        after = [format_interval(t_interval([_end(run, t) for run in runs]), 0) for t in ("hard tasks", *HARD)]
        changes = [format_interval(t_interval([of(run) for run in runs]), 1) for of in (change, change_at_limits)]
        p_value = format_p_value(p[task.task.name, name])
        rows.append([STUDY_METHODS[name].title, str(len(runs)), after[0], changes[0], p_value, changes[1], *after[1:]])
    head = ["", "seeds", "hard tasks, %", "change", "p (Holm)", "change within the limits"]
    return markdown_table([*head, *HARD], rows)


def change(run: CellRun) -> float:
    """Change of the hard tasks over the training, in percentage points."""
    curve = tinyeval_curve(run.rows)
    return 100 * (curve[-1] - curve[0])


def change_at_limits(run: CellRun) -> float:
    """The same where diversity or distance reach their limits."""
    curve = tinyeval_curve(run.rows)
    return 100 * (at_limits(run.rows, curve) - curve[0])


def mean_change(results: StudyResults, name: str) -> str:
    """Change over the comparable tasks that train on following prompts, with the seeds as draws; a dash without any.

    A task counts once every seed is finished: otherwise the seeds would be means over different tasks.
    """
    by_seed: dict[int, list[float]] = {}
    for task in results.comparable(name):
        if task.task.reward == FOLLOWING:
            for run in task.runs[name]:
                by_seed.setdefault(run.seed, []).append(change(run))
    return format_interval(t_interval([_mean(values) for values in by_seed.values()]), 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _end(run: CellRun, task: str) -> float:
    return 100 * tinyeval_curve(run.rows, task)[-1]


def _percent(row: Row, task: str) -> str:
    return format_number(100 * row["tinyeval_shares"][task], 0)
