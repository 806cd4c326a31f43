"""The benchmark's tables, as Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..study.grid import KEEPS, Task, choose, competing, tried
from ..study.methods import BASELINE, CONTENDERS, OURS, RECIPES, REWARDS, Form, Setting
from ..study.statistics import Interval, Mixed, bootstrap, holm, median, mixed, t_limits, t_test
from .collect import GOALS, Found, Run, both, by_seed, by_step

REFERENCES = (BASELINE, OURS)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.{digits}f}"


def limits(found: Interval, digits: int = 2) -> str:
    """`value [low, high]`, without brackets where there are no limits."""
    if not math.isfinite(found.value) or math.isnan(found.low):
        return number(found.value, digits)
    return f"{number(found.value, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"


def chance(p: float) -> str:
    """A p-value as it is printed."""
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _means(runs: Sequence[Run], of: Callable[[Run], float], digits: int = 2) -> str:
    """Mean over seeds with Student's limits, over those that have the number."""
    values = [of(run) for run in runs]
    return limits(t_limits([v for v in values if not math.isnan(v)]), digits)


def tuning(form: Form, task: Task, out: Path) -> str:
    """The outcome on the tuning seeds by setting, the chosen one in bold; empty where none is finished."""
    names = competing(form, task)
    found = {name: tried(form, task, name, out) for name in names}
    if not any(found.values()):
        return ""
    every, chosen = form.sweep[RECIPES[task.recipe].kind], choose(form, task, out) or {}

    def cell(name: str, setting: Setting) -> str:
        one = found[name].get(setting)
        if one is None:
            return "-"
        text = number(one.gain) if one.kept >= KEEPS else f"{number(one.gain)} ({100 * one.kept:.0f} %)"
        return f"**{text}**" if chosen.get(name) == setting else text

    rows = [[CONTENDERS[name].title, *(cell(name, setting) for setting in every)] for name in names]
    return table(["mean kept gain on the way", *(f"{rate:g}, {clip:g}" for rate, clip in every)], rows)


def equal_settings(form: Form, wanted: Sequence[Task], out: Path) -> str:
    """Contenders against native PPO at the same setting on the tuning seeds; empty without tuning."""
    rows: dict[str, list[str]] = {name: [] for name in form.contenders if name != BASELINE}
    titles = []
    for task in wanted:
        found = {name: tried(form, task, name, out) for name in competing(form, task)}
        base = found[BASELINE]
        if not base:
            continue
        titles.append(f"{RECIPES[task.recipe].title.split(':')[0]}, {RECIPES[task.recipe].model}, {task.reward}")
        for name, cells in rows.items():
            gaps = [own.gain - base[s].gain for s, own in found.get(name, {}).items() if s in base]
            cells.append(f"{sum(g > 0 for g in gaps)}/{len(gaps)}, {sum(gaps) / len(gaps):+.2f}" if gaps else "-")
    return table(["", *titles], [[CONTENDERS[name].title, *cells] for name, cells in rows.items()]) if titles else ""


def gains(found: Found) -> str:
    """The chosen setting, the kept gain on the way and at the end, and what the whole run ends with."""
    rows = []
    for name, runs in found.runs.items():
        rate, clip = found.chosen[name]
        setting = f"{rate:g}, {clip:g}" if CONTENDERS[name].clips else f"{rate:g}, -"
        numbers = [_means(runs, of) for of in (lambda r: r.outcome, lambda r: r.kept[-1], lambda r: r.gains[-1])]
        shares = [f"{100 * run.share:.0f}" for run in runs]
        own = _means(runs, lambda r: r.own, 3)
        rows.append([CONTENDERS[name].title, setting, str(len(runs)), *numbers, " ".join(shares), own])
    head = ["", "learning rate, clip", "seeds", "mean kept gain on the way", "kept gain", "gain at the end"]
    return table([*head, "right objects kept at the end, % by seed", "reward of own rollouts"], rows)


def others(found: Found) -> str:
    """Gains in the rewards that were not trained on, at the last examination that keeps the pictures."""
    names = [name for name in REWARDS if name != found.task.reward]
    rows = [
        [CONTENDERS[name].title, *(_means(runs, lambda r, reward=reward: r.gain_in(reward)) for reward in names)]
        for name, runs in found.runs.items()
    ]
    return table(["kept gain in rewards not trained on", *names], rows)


def times(found: Found, form: Form) -> str:
    """Updates to each goal (median of the seeds, and how many of them got there), then images and seconds."""
    updates, prices = [], []
    for name, runs in found.runs.items():
        reached = [sum(math.isfinite(run.reach(goal)) for run in runs) for goal in GOALS]
        spent = [
            [bootstrap([run.reach(goal) * price(run) for run in runs], median) for goal in GOALS]
            for price in (lambda r: 1, lambda r: form.images_per_update, lambda r: r.result["seconds_per_update"])
        ]
        title = CONTENDERS[name].title
        updates.append([title, *(f"{limits(t, 1)} ({n}/{len(runs)})" for t, n in zip(spent[0], reached, strict=True))])
        prices.append([title, *(f"{limits(i, 0)}; {limits(s, 0)}" for i, s in zip(*spent[1:], strict=True))])
    heads = [f"to +{goal:g}" for goal in GOALS]
    return "\n\n".join(
        [table(["updates, median of the seeds", *heads], updates), table(["images; seconds", *heads], prices)]
    )


def health(found: Found) -> str:
    """Means over all updates of all seeds; per-step extremes show how flat a contender is."""
    rows = []
    for name, runs in found.runs.items():
        clip, norm, taylor = (by_step(runs, key)[1] for key in ("clip_fraction", "grad_norm", "taylor_error"))
        whole = [[record["grad_norm"] for record in run.records] for run in runs]
        unsteady = float(np.mean([np.std(w) / np.mean(w) for w in whole]))
        rows.append(
            [
                CONTENDERS[name].title,
                f"{100 * clip.mean():.1f} %",
                f"{100 * clip.min():.1f} to {100 * clip.max():.1f} %",
                f"{np.mean(whole):.2e}",
                f"{unsteady:.2f}",
                f"{norm.max() / norm.min():.1f}",
                f"{taylor.mean():.1e}",
            ]
        )
    head = [
        "",
        "clip fraction",
        "per step",
        "gradient norm",
        "its std / mean",
        "largest / smallest step",
        "Taylor error",
    ]
    return table(head, rows)


def matched(found: Found, goal: float) -> str:
    """What was given up at the moment when the gain reached `goal`; seeds that never did are left out."""
    keys = (("fd_base", 0), ("fd_drawn", 0), ("diversity", 3), ("object", 3), ("count", 3), ("alignment", 3))
    rows = []
    for name, runs in found.runs.items():
        reached = sum(math.isfinite(run.reach(goal)) for run in runs)
        cells = [_means(runs, lambda r, key=key: r.matched(key, goal), digits) for key, digits in keys]
        rows.append([f"{CONTENDERS[name].title} ({reached}/{len(runs)})", *cells])
    base = next(iter(found.runs.values()))[0]
    rows.insert(0, ["base model", *(number(base.examined(key)[0], digits) for key, digits in keys)])
    return table(["", "FD to base", "FD to drawn", "diversity", "right object", "right count", "alignment"], rows)


def chances(found: Sequence[Found]) -> dict[tuple[str, str], float]:
    """p of every contender against native PPO and against PCPO by seeds, all of them one family of Holm's."""
    names = [name for name in CONTENDERS if any(name in task.runs for task in found)]
    wanted = [(name, BASELINE) for name in names if name != BASELINE]
    wanted += [(name, OURS) for name in names if name not in REFERENCES]
    corrected = holm([t_test(by_seed(found, *pair)) for pair in wanted])
    every = dict(zip(wanted, corrected, strict=True))
    return every | {(second, first): p for (first, second), p in every.items()}


def against(found: Sequence[Found], reference: str) -> tuple[str, Mixed]:
    """Every contender against one of them over all tasks: the mixed model, and the seeds' averages over the tasks."""
    model = mixed([row for task in found for row in task.rows()], reference)
    p, lines = chances(found), []
    for name in (name for name in CONTENDERS if name in model.effects):
        by_model = [limits(model.effects[name]), chance(model.p[name])]
        by_seeds = [limits(t_limits(by_seed(found, name, reference))), chance(p[name, reference])]
        counts = [wins(found, name, reference), fewer(found, name, reference)]
        raw = limits(t_limits(by_seed(found, name, reference, lambda run: run.gains[-1])))
        lines.append([CONTENDERS[name].title, *by_model, *by_seeds, *counts, raw])
    head = [f"against {CONTENDERS[reference].title}", "difference (mixed model)", "p", "difference (by seeds)"]
    head += ["p (Holm)", "better in", f"fewer updates to +{GOALS[0]:g}", "at the end, ruined pictures too"]
    return table(head, lines), model


def wins(found: Sequence[Found], name: str, reference: str) -> str:
    """In how many pairs of seed and task the outcome is better, of how many."""
    gaps = [mine.outcome - other.outcome for mine, other in both(found, name, reference)]
    return f"{sum(gap > 0 for gap in gaps)}/{len(gaps)}"


def fewer(found: Sequence[Found], name: str, reference: str) -> str:
    """Median share of updates saved on the way to the first goal, over the seeds of which at least one gets there.

    A reference that never gets there counts with the updates that it ran, so what it is given is too little.
    """
    saved = []
    for mine, other in both(found, name, reference):
        own, others = mine.reach(GOALS[0]), other.reach(GOALS[0])
        if min(own, others) < math.inf:
            saved.append(1 - own / min(others, other.updates[-1]))
    middle = bootstrap(saved, median)
    low, value, high = (
        f"{round(100 * v)} %" if math.isfinite(v) else "never" for v in (middle.low, middle.value, middle.high)
    )
    return f"{value} [{low}, {high}] of {len(saved)}" if len(saved) > 1 else "-"


def describe(task: Task) -> str:
    recipe = RECIPES[task.recipe]
    return f"{recipe.model}, {recipe.title}, reward {task.reward}"
