"""Tables and pictures of what there is, into results.md below its line; what is written above that line is kept."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..speed import speed
from ..study import guidance
from ..study.grid import KEEPS, competing, tasks, tuned_as
from ..study.methods import BASELINE, CONTENDERS, OURS, PROMPTS, RECIPES, Form
from ..study.statistics import mixed, t_limits, t_test
from . import figures, tables
from .collect import GOALS, Found, by_seed, collect, collect_common

EQUAL = """At equal settings, whatever was chosen: in how many settings of the sweep a contender's mean kept gain on the
way is above native PPO's, and by how much on average. Read the pattern: seeds are few."""
LINE = "<!-- below: python -m trainer benchmark --part report; what is above this line is kept -->"
POOLED = """Compared is the mean kept gain on the way. The mixed model takes each seed of each task for a block of its
own and one spread for all, though a seed has the same prompts and noise in every task and contenders differ in spread;
the columns by seeds average a seed's differences over the tasks first (Student's t over the seeds), and their p are
corrected by Holm's method, both tables together. Trust the latter. Either speaks of these tasks only.

Fewer updates: of the seeds in which either of the two gets to the goal, the median share of updates that the contender
saves [95 %, bootstrap]. Where only it gets there the other one counts with all the updates that it ran, so the true
share is larger; below zero it needs more; never: only the other one gets there. The last column is the difference in
reward after the last update whatever the pictures look like, as publications count it, by seeds."""


def report(form_name: str, form: Form, out: Path, folder: Path, pictures: Path) -> Path:
    """Write results.md into `folder` and its pictures into `pictures`, a folder below it."""
    pictures.mkdir(parents=True, exist_ok=True)
    where = pictures.relative_to(folder).as_posix()
    found = collect(form, out)
    parts = [setup(form_name, form, found)]
    for task in found:
        parts.append(task_part(task, form, pictures, where))
    whole = finished_tasks(found, form)
    if whole:
        parts.insert(1, overall(whole, pictures, where))
    same = finished_tasks(collect_common(form, out), form)
    if same:
        parts.insert(2, at_one_setting(same, collect_common(form, out, fresh=True), form))
    chosen = tuning_part(form, out)
    parts += [
        part for part in (chosen, guidance.report(out, pictures, where), speed.report(out, pictures, where)) if part
    ]
    file = folder / "results.md"
    kept = file.read_text(encoding="utf-8").split(LINE)[0] if file.is_file() else "# Results\n\n"
    file.write_text(kept + LINE + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def setup(form_name: str, form: Form, found: Sequence[Found]) -> str:
    """How the numbers were made."""
    commits = sorted({run.result["commit"] for task in found for runs in task.runs.values() for run in runs})
    sweeps = "; ".join(
        f"{kind}: " + ", ".join(f"({rate:g}, {clip:g})" for rate, clip in sweep) for kind, sweep in form.sweep.items()
    )
    size = f"{form.updates} updates of {form.prompts_per_update} prompts x {form.group_size} images"
    exam = len(PROMPTS) * form.each
    return f"""## How it was measured

    python -m trainer benchmark --form {form_name}

at commit {", ".join(commits) or "-"}. Every run: {size}, {form.steps} denoising steps, LoRA of rank 8, no guidance.
Every {form.every} updates, and before the first, comes an exam: {exam} pictures of the training prompts, with the same
noise in every exam, sampled without noise (ODE). Gains are in standard deviations of the base model's rewards there.

**A gain counts only while the pictures last.** Where an exam finds less than {100 * KEEPS:.0f} % of the base model's
right objects, the *kept gain* stays at that of the last exam that found more, as if one had stopped there. The *mean
kept gain on the way* is the area under that curve; contenders are compared in it, and settings are chosen by it.

Learning rate and clip range ({sweeps})
were chosen for each contender and task on seeds {_list(form.tuning_seeds)}, which are not reported. Reported are seeds
{_list(form.seeds)}. With the same seed all contenders of a task see the same prompts and the same noise, but for AWM
and DiffusionNFT, which sample without noise in training too and never share the first noise within a group.

Brackets are 95 %: Student's over seeds for means, bootstrap for medians. Times lie on straight lines between exams, so
those below {form.every} updates are estimates. tempflow and guard are one credit (docs/paper.md). Right objects, right
counts, tiny FD and diversity are read by emoji-align, whose cosine is also the reward alignment. Tiny FD is taken from
{exam} pictures to {form.reference}: compare it within a table only. With two minibatches, the first meets a ratio of 1,
so clip fractions end at 50 %."""


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "(none: one setting)"


def tuning_part(form: Form, out: Path) -> str:
    """How much each setting gave, task by task; empty where nothing was tuned."""
    tuned = [task for task in tasks(form) if tuned_as(form, task) == task]
    found = {tables.describe(task): tables.tuning(form, task, out) for task in tuned}
    parts = [f"{name}:\n\n{text}" for name, text in found.items() if text]
    seeds = (
        f"By learning rate and clip range, on tuning seeds {_list(form.tuning_seeds)} only; bold was chosen. In "
        f"brackets what is left of the base model's right objects at the end, where less than {100 * KEEPS:.0f} %."
    )
    if not parts:
        return ""
    return "\n\n".join(["## Settings", seeds, *parts, EQUAL, tables.equal_settings(form, tuned, out)])


def finished_tasks(found: Sequence[Found], form: Form) -> list[Found]:
    """Those of which every contender has every seed."""
    return [
        task
        for task in found
        if list(task.runs) == competing(form, task.task)
        and all(len(runs) == len(form.seeds) for runs in task.runs.values())
    ]


def at_one_setting(found: Sequence[Found], fresh: Sequence[Found], form: Form) -> str:
    """All contenders at one setting of the sweep, whatever was chosen, and the main pair once more on fresh seeds."""
    titles = "; ".join(
        "{} at {:g}, {:g}".format(tables.describe(task.task), *form.common[task.task.recipe]) for task in found
    )
    text, _ = tables.against(found, tables.REFERENCES[0])
    parts = [
        "## At one setting for all",
        "Choosing by few seeds is itself a lottery, so here all contenders have the same learning rate and clip range, "
        f"on the reported seeds of {titles}.",
        text,
        *(f"{tables.describe(task.task)}:\n\n{tables.gains(task)}\n\n{tables.health(task)}" for task in found),
    ]
    gaps = by_seed(fresh, OURS, BASELINE)
    if gaps:
        pairs = tables.wins(fresh, OURS, BASELINE)
        saved = tables.fewer(fresh, OURS, BASELINE)
        parts.append(
            f"Once more on seeds {_list(form.fresh_seeds)}, which nothing was decided by, PCPO against native PPO: "
            f"{tables.limits(t_limits(gaps))} by seeds, p = {tables.chance(t_test(gaps))}, better in {pairs}, "
            f"fewer updates to +{GOALS[0]:g}: {saved}."
        )
    return "\n\n".join(parts)


def overall(found: Sequence[Found], pictures: Path, where: str) -> str:
    """All contenders against native PPO and against PCPO, over the tasks of which every seed is finished."""
    parts = ["## All finished tasks together", "; ".join(tables.describe(task.task) for task in found) + "."]
    groups = []
    for task in found:
        effects = mixed(task.rows(), tables.REFERENCES[0]).effects
        groups.append((tables.describe(task.task), [(name, effects[name]) for name in task.runs if name in effects]))
    figures.forest(
        groups,
        "Over native PPO",
        "difference in the mean kept gain on the way, std of the base model's rewards, 95 % limits",
    ).save(pictures / "effects.png")
    parts.append(f"![Over native PPO]({where}/effects.png)")
    for reference in tables.REFERENCES:
        if all(reference in task.runs for task in found):
            text, model = tables.against(found, reference)
            spread = (
                f"Blocks (a seed of a task) differ by a std of {model.block_std:.2f}, runs by {model.residual_std:.2f}."
            )
            parts += [text, f"Mixed model: random intercepts, REML. {spread}"]
    parts.append(POOLED)
    return "\n\n".join(parts)


def task_part(found: Found, form: Form, pictures: Path, where: str) -> str:
    """One task: convergence, times, health, matched reward."""
    stem = found.task.name.replace("/", "-")
    for kind in ("convergence", "health", "matched"):
        getattr(figures, kind)(found).save(pictures / f"{stem}-{kind}.png")
    goal = best_goal(found)
    alone = [CONTENDERS[n].title for n, runs in found.runs.items() if len(runs) < len(form.seeds)]
    notes = [f"Not all seeds are finished for {', '.join(alone)}."] if alone else []
    source = tuned_as(form, found.task)
    if source != found.task:
        notes.append(f"Settings are those chosen for {tables.describe(source)}.")
    notes += edges(found, form)
    return "\n\n".join(
        [
            f"## {tables.describe(found.task)}",
            *notes,
            f"![Convergence]({where}/{stem}-convergence.png)",
            tables.gains(found),
            tables.others(found),
            tables.times(found, form),
            f"![Health]({where}/{stem}-health.png)",
            tables.health(found),
            f"![Price along training]({where}/{stem}-matched.png)",
            f"When the kept gain reaches +{goal:g}; seeds that never get there are left out:",
            tables.matched(found, goal),
        ]
    )


def edges(found: Found, form: Form) -> list[str]:
    """Who chose at an end of the sweep, beyond which something better might lie."""
    sweep, notes = form.sweep[RECIPES[found.task.recipe].kind], []
    for part, what in enumerate(("learning rates", "clip ranges")):
        values = {setting[part] for setting in sweep}
        for end, value in (("upper", max(values)), ("lower", min(values))):
            names = [n for n in found.runs if found.chosen[n][part] == value and (CONTENDERS[n].clips or part == 0)]
            if names and len(values) > 1:
                titles = ", ".join(CONTENDERS[n].title for n in names)
                notes.append(f"Chosen at the {end} end of the {what}: {titles}.")
    return notes


def best_goal(found: Found) -> float:
    """The largest goal that every contender reaches with at least half of its seeds, else the smallest goal."""
    most = [
        g
        for g in GOALS
        if all(2 * sum(math.isfinite(r.reach(g)) for r in runs) >= len(runs) for runs in found.runs.values())
    ]
    return max(most, default=GOALS[0])
