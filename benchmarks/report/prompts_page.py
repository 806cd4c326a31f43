"""The page on following prompts: TinyEval before and after training, on prompts that are never trained."""

from comfyui_pcpo.tiny.tinyeval import HARD

from ..markdown import format_interval, format_number, format_p_value, markdown_table
from ..study.methods import STUDY_METHODS
from ..study.outcome import Row, at_limits, tinyeval_curve
from ..study.recipes import FOLLOWING
from ..study.statistics import t_interval
from .collect import CellRun, StudyResults, TaskResults
from .comparison import corrected_p_values, means_by_seed

PROMPTS_INTRO = f"""TinyEval's hard tasks: {", ".join(HARD)}; 20 prompts each, one image per prompt from fixed noise,
none of their combinations trained. Numbers are per cent of correct images, means over seeds with Student's 95 %
interval. "Change" is that from before training to its end, "within the limits" that to the point where either limit is
reached. p-values test a change of 0, over the tasks of a reward, and are corrected by Holm's method over the page. The
first tables have the methods that exist on both models and have finished every task that the first wave has."""


def prompts_page(results: StudyResults) -> str:
    """Tasks that train on following prompts first, then the side effects of the others."""
    tasks = sorted(results.measured, key=lambda task: task.task.reward != FOLLOWING)
    rewards = list(dict.fromkeys(task.task.reward for task in tasks))
    changes = {
        (reward, name): means_by_seed(results, name, reward, change) for reward in rewards for name in results.general
    }
    p = corrected_p_values(changes)
    parts = ["# Does it follow prompts better?", PROMPTS_INTRO]
    for reward in rewards:
        parts += [f"## Trained on {reward}", change_table(results, reward, p)]
        parts += [f"### {task.task.title}\n\n{following_table(task)}" for task in tasks if task.task.reward == reward]
    return "\n\n".join(parts)


def change_table(results: StudyResults, reward: str, p: dict[tuple[str, str], float]) -> str:
    """The change by method that exists in every task, a mean over the tasks of a reward."""
    rows = []
    for name in results.general:
        means = (means_by_seed(results, name, reward, of) for of in (change, change_at_limits))
        whole, within = (format_interval(t_interval(values), 1) for values in means)
        rows.append([STUDY_METHODS[name].title, whole, format_p_value(p[reward, name]), within])
    return markdown_table(["", "change", "p (Holm)", "change within the limits"], rows)


def following_table(task: TaskResults) -> str:
    """TinyEval by method: all hard tasks before, their change, and each task after training."""
    base = task.runs[task.measured[0]][0].rows[0]
    rows = [["base model", "-", _percent(base, "hard tasks"), "-", "-", *(_percent(base, t) for t in HARD)]]
    for name in task.measured:
        runs = task.runs[name]
        after = [format_interval(t_interval([_end(run, t) for run in runs]), 0) for t in ("hard tasks", *HARD)]
        changes = [format_interval(t_interval([of(run) for run in runs]), 1) for of in (change, change_at_limits)]
        rows.append([STUDY_METHODS[name].title, str(len(runs)), after[0], *changes, *after[1:]])
    head = ["", "seeds", "hard tasks, %", "change", "change within the limits"]
    return markdown_table([*head, *HARD], rows)


def change(run: CellRun) -> float:
    """Change of the hard tasks over the training, in percentage points."""
    curve = tinyeval_curve(run.rows)
    return 100 * (curve[-1] - curve[0])


def change_at_limits(run: CellRun) -> float:
    """The same to where diversity or distance reaches its limit."""
    curve = tinyeval_curve(run.rows)
    return 100 * (at_limits(run.rows, curve) - curve[0])


def mean_change(results: StudyResults, name: str) -> str:
    """Change over the tasks that train on following prompts, with its interval over seeds; a dash without any."""
    return format_interval(t_interval(means_by_seed(results, name, FOLLOWING, change)), 1)


def _end(run: CellRun, task: str) -> float:
    return 100 * tinyeval_curve(run.rows, task)[-1]


def _percent(row: Row, task: str) -> str:
    return format_number(100 * row["tinyeval_shares"][task], 0)
