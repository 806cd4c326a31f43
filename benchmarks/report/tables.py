"""Tables of one task, and of the tuning, as Markdown."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..study.grid import StudyTask, task_methods
from ..study.kept_gain import KEEPS
from ..study.methods import BASELINE, STUDY_METHODS
from ..study.recipes import RECIPES, STUDY_REWARDS
from ..study.statistics import bootstrap, median, t_interval
from ..study.studies import Setting, Study
from ..study.tuning import choose, tuning_results
from .collect import GOALS, CellRun, TaskResults, by_step
from .markdown import format_interval, format_number, markdown_table

MATCHED = {  # columns of the comparison at equal gain: key of an evaluation -> (title, digits)
    "fd_base": ("FD to base model", 0),
    "fd_drawn": ("FD to drawings", 0),
    "diversity": ("diversity", 3),
    "object": ("correct object", 3),
    "count": ("correct count", 3),
    "alignment": ("alignment", 3),
}


def _seed_mean(runs: Sequence[CellRun], of: Callable[[CellRun], float], digits: int = 2) -> str:
    """Mean over the seeds that have the number, with Student's interval."""
    values = [of(run) for run in runs]
    return format_interval(t_interval([v for v in values if not math.isnan(v)]), digits)


def gain_table(results: TaskResults) -> str:
    """Chosen setting, mean kept gain over training, kept gain and gain at the end."""
    rows = []
    for name, runs in results.runs.items():
        rate, clip = results.chosen[name]
        setting = f"{rate:g}, {clip:g}" if STUDY_METHODS[name].clips else f"{rate:g}, -"
        gains = [
            _seed_mean(runs, of) for of in (lambda r: r.mean_kept_gain, lambda r: r.kept[-1], lambda r: r.gains[-1])
        ]
        shares = [f"{100 * run.share:.0f}" for run in runs]
        own = _seed_mean(runs, lambda r: r.rollout_reward, 3)
        rows.append([STUDY_METHODS[name].title, setting, str(len(runs)), *gains, " ".join(shares), own])
    head = ["", "learning rate, clip", "seeds", "mean kept gain", "final kept gain", "final gain, all images"]
    return markdown_table([*head, "objects kept at the end, % by seed", "reward of own rollouts"], rows)


def held_out_table(results: TaskResults) -> str:
    """Gains in the rewards that were not trained, at the last evaluation that kept its objects."""
    names = [name for name in STUDY_REWARDS if name != results.task.reward]
    rows = [
        [STUDY_METHODS[name].title, *(_seed_mean(runs, lambda r, reward=reward: r.gain_in(reward)) for reward in names)]
        for name, runs in results.runs.items()
    ]
    return markdown_table(["kept gain in held-out rewards", *names], rows)


def time_tables(results: TaskResults, study: Study) -> str:
    """Updates to each goal (median over seeds, seeds that reach it), then images and seconds."""
    updates, costs = [], []
    for name, runs in results.runs.items():
        reached = [sum(math.isfinite(run.reach(goal)) for run in runs) for goal in GOALS]
        times, images, seconds = (
            [bootstrap([run.reach(goal) * cost(run) for run in runs], median) for goal in GOALS]
            for cost in (lambda r: 1, lambda r: study.images_per_update, lambda r: r.result["seconds_per_update"])
        )
        title = STUDY_METHODS[name].title
        updates.append(
            [title, *(f"{format_interval(t, 1)} ({n}/{len(runs)})" for t, n in zip(times, reached, strict=True))]
        )
        pairs = zip(images, seconds, strict=True)
        costs.append([title, *(f"{format_interval(i, 0)}; {format_interval(s, 0)}" for i, s in pairs)])
    heads = [f"to +{goal:g}" for goal in GOALS]
    first = markdown_table(["updates, median over seeds", *heads], updates)
    return first + "\n\n" + markdown_table(["images; seconds", *heads], costs)


def health_table(results: TaskResults) -> str:
    """Means over all updates of all seeds; the extremes per step show how even a method is."""
    rows = []
    for name, runs in results.runs.items():
        clip, norm, taylor = (by_step(runs, key)[1] for key in ("clip_fraction", "grad_norm", "taylor_error"))
        norms = [[record["grad_norm"] for record in run.records] for run in runs]
        variation = float(np.mean([np.std(of_run) / np.mean(of_run) for of_run in norms]))
        rows.append(
            [
                STUDY_METHODS[name].title,
                f"{100 * clip.mean():.1f} %",
                f"{100 * clip.min():.1f} to {100 * clip.max():.1f} %",
                f"{np.mean(norms):.2e}",
                f"{variation:.2f}",
                f"{norm.max() / norm.min():.1f}",
                f"{taylor.mean():.1e}",
            ]
        )
    head = ["", "clip fraction", "per step", "gradient norm", "std / mean", "largest / smallest step", "Taylor error"]
    return markdown_table(head, rows)


def matched_table(results: TaskResults, goal: float) -> str:
    """Image quality where the kept gain reaches `goal`; seeds that never reach it are left out."""
    rows = []
    for name, runs in results.runs.items():
        reached = sum(math.isfinite(run.reach(goal)) for run in runs)
        cells = [_seed_mean(runs, lambda r, key=key: r.matched(key, goal), d) for key, (_, d) in MATCHED.items()]
        rows.append([f"{STUDY_METHODS[name].title} ({reached}/{len(runs)})", *cells])
    base = next(iter(results.runs.values()))[0]
    rows.insert(0, ["base model", *(format_number(base.evaluated(key)[0], d) for key, (_, d) in MATCHED.items())])
    return markdown_table(["", *(title for title, _ in MATCHED.values())], rows)


def tuning_table(study: Study, task: StudyTask, out: Path) -> str:
    """Outcome on the tuning seeds by setting, the chosen one in bold; empty if none is finished."""
    names = task_methods(study, task)
    results = {name: tuning_results(study, task, name, out) for name in names}
    if not any(results.values()):
        return ""
    sweep, chosen = study.sweep[RECIPES[task.recipe].kind], choose(study, task, out) or {}

    def cell(name: str, setting: Setting) -> str:
        result = results[name].get(setting)
        if result is None:
            return "-"
        number = format_number(result.gain)
        text = number if result.kept >= KEEPS else f"{number} ({100 * result.kept:.0f} %)"
        return f"**{text}**" if chosen.get(name) == setting else text

    rows = [[STUDY_METHODS[name].title, *(cell(name, setting) for setting in sweep)] for name in names]
    return markdown_table(["mean kept gain", *(f"{rate:g}, {clip:g}" for rate, clip in sweep)], rows)


def equal_settings_table(study: Study, tasks: Sequence[StudyTask], out: Path) -> str:
    """Methods against native PPO at the same setting on the tuning seeds; empty without tuning."""
    rows: dict[str, list[str]] = {name: [] for name in study.methods if name != BASELINE}
    titles = []
    for task in tasks:
        results = {name: tuning_results(study, task, name, out) for name in task_methods(study, task)}
        base = results[BASELINE]
        if not base:
            continue
        titles.append(f"{RECIPES[task.recipe].paper}, {RECIPES[task.recipe].model}, {task.reward}")
        for name, cells in rows.items():
            gaps = [own.gain - base[s].gain for s, own in results.get(name, {}).items() if s in base]
            cells.append(f"{sum(g > 0 for g in gaps)}/{len(gaps)}, {sum(gaps) / len(gaps):+.2f}" if gaps else "-")
    lines = [[STUDY_METHODS[name].title, *cells] for name, cells in rows.items()]
    return markdown_table(["", *titles], lines) if titles else ""
