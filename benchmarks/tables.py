"""The benchmark's tables, as Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from .collect import GOALS, Found, Run, by_step, pairs
from .contenders import BASELINE, CONTENDERS, OURS, RECIPES, Form
from .grid import Setting, Task, choose, competing, tried
from .statistics import Interval, Mixed, bootstrap, holm, mean, median, mixed, sign_flip


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


def _over(runs: Sequence[Run], of: Callable[[Run], float], statistic=mean) -> Interval:
    values = [of(run) for run in runs]
    return bootstrap([v for v in values if not math.isnan(v)], statistic)


def tuning(form: Form, task: Task, out: Path) -> str:
    """Mean gain on the way on the tuning seeds by setting, the chosen one in bold; empty where none is finished."""
    names = competing(form, task)
    found = {name: tried(form, task, name, out) for name in names}
    if not any(found.values()):
        return ""
    every, chosen = [(r, c) for r in form.learning_rates for c in form.clip_ranges], choose(form, task, out) or {}

    def cell(name: str, setting: Setting) -> str:
        one = found[name].get(setting)
        if one is None:
            return "-"
        text = number(one.gain) if one.keeps else f"{number(one.gain)} ({100 * one.kept:.0f} %)"
        return f"**{text}**" if chosen.get(name) == setting else text

    rows = [[CONTENDERS[name].title, *(cell(name, setting) for setting in every)] for name in names]
    return table(["mean gain on the way", *(f"{rate:g}, {clip:g}" for rate, clip in every)], rows)


def equal_settings(form: Form, wanted: Sequence[Task], out: Path) -> str:
    """Contenders against native PPO at the same setting, where both keep the pictures; empty without tuning."""
    rows: dict[str, list[str]] = {name: [] for name in form.contenders if name != BASELINE}
    titles = []
    for task in wanted:
        found = {name: tried(form, task, name, out) for name in competing(form, task)}
        base = found[BASELINE]
        if not base:
            continue
        titles.append(f"{RECIPES[task.recipe].title.split(':')[0]}, {RECIPES[task.recipe].model}, {task.reward}")
        for name, cells in rows.items():
            own = found.get(name, {})
            shared = [s for s in own if s in base and own[s].keeps and base[s].keeps]
            gaps = [own[s].gain - base[s].gain for s in shared]
            cells.append(f"{sum(g > 0 for g in gaps)}/{len(gaps)}, {sum(gaps) / len(gaps):+.2f}" if gaps else "-")
    return table(["", *titles], [[CONTENDERS[name].title, *cells] for name, cells in rows.items()]) if titles else ""


def gains(found: Found) -> str:
    """The chosen setting, gain at the end and on the way, and the reward of the last quarter of its own rollouts."""
    rows = []
    for name, runs in found.runs.items():
        rate, clip = found.chosen[name]
        setting = f"{rate:g}, {clip:g}" if CONTENDERS[name].clips else f"{rate:g}, -"
        numbers = [limits(_over(runs, of)) for of in (lambda r: r.gain, lambda r: r.area)]
        numbers.append(limits(_over(runs, lambda r: r.own), 3))
        rows.append([CONTENDERS[name].title, setting, str(len(runs)), *numbers])
    return table(
        ["", "learning rate, clip", "seeds", "gain at the end", "mean gain on the way", "reward of own rollouts"], rows
    )


def times(found: Found, form: Form) -> str:
    """Updates to each goal (median of the seeds, and how many of them got there), then images and seconds."""
    updates, prices = [], []
    for name, runs in found.runs.items():
        reached = [sum(math.isfinite(run.reach(goal)) for run in runs) for goal in GOALS]
        spent = [
            [_over(runs, lambda r, goal=goal, price=price: r.reach(goal) * price(r), median) for goal in GOALS]
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
        cells = [limits(_over(runs, lambda r, key=key: r.matched(key, goal)), digits) for key, digits in keys]
        rows.append([f"{CONTENDERS[name].title} ({reached}/{len(runs)})", *cells])
    base = next(iter(found.runs.values()))[0]
    rows.insert(0, ["base model", *(number(base.examined(key)[0], digits) for key, digits in keys)])
    return table(["", "FD to base", "FD to drawn", "diversity", "right object", "right count", "alignment"], rows)


def against(found: Sequence[Found], reference: str) -> tuple[str, Mixed]:
    """Every contender against one of them over all tasks: mixed-effects estimate, sign-flip p, Holm's correction."""
    rows = [row for task in found for row in task.rows("gain")]
    model = mixed(rows, reference)
    names = [name for name in CONTENDERS if name in model.effects]
    differences = {name: pairs(rows, name, reference) for name in names}
    corrected = holm([sign_flip(differences[name]) for name in names])
    lines = []
    for name, p in zip(names, corrected, strict=True):
        wins = sum(d > 0 for d in differences[name])
        cells = [limits(model.effects[name]), f"{model.p[name]:.3f}", f"{p:.3f}", f"{wins}/{len(differences[name])}"]
        lines.append([CONTENDERS[name].title, *cells, fewer(found, name, reference)])
    head = [f"against {CONTENDERS[reference].title}", "difference in gain", "p (mixed model)", "p (sign flips, Holm)"]
    return table([*head, "better in", f"fewer updates to +{GOALS[0]:g}"], lines), model


def fewer(found: Sequence[Found], name: str, reference: str) -> str:
    """Median share of updates saved on the way to the first goal, over the seeds of which at least one gets there."""
    both = [
        (mine.reach(GOALS[0]), other.reach(GOALS[0]))
        for task in found
        for mine in task.runs.get(name, ())
        for other in task.runs[reference]
        if mine.seed == other.seed
    ]
    saved = [
        1 - mine / other if math.isfinite(mine) else -math.inf for mine, other in both if min(mine, other) < math.inf
    ]
    middle = bootstrap(saved, median)
    low, value, high = (
        f"{100 * v:.0f} %" if math.isfinite(v) else "never" for v in (middle.low, middle.value, middle.high)
    )
    return f"{value} [{low}, {high}] of {len(saved)}" if len(saved) > 1 else "-"


def describe(task: Task) -> str:
    recipe = RECIPES[task.recipe]
    return f"{recipe.model}, {recipe.title}, reward {task.reward}"


REFERENCES = (BASELINE, OURS)
