"""Tables and pictures of what there is, into results.md below its line; what is written above that line is kept."""

from collections.abc import Sequence
from pathlib import Path

from . import figures, guidance, speed, tables
from .collect import GOALS, Found, collect
from .contenders import CONTENDERS, PROMPTS, Form
from .grid import KEEPS, tasks
from .statistics import mixed

EQUAL = """At equal settings, whatever was chosen: in how many settings, of those in which both keep the pictures, a
contender's mean gain on the way is above native PPO's, and by how much on average. Read the pattern: seeds are few."""
LINE = "<!-- below: python -m trainer benchmark --part report; what is above this line is kept -->"
POOLED = """A seed has the same prompts and noise in every task, so these blocks are not independent of each other:
pooled limits and p speak of these tasks only, not of tasks in general.

Fewer updates: of the seeds in which either of the two gets to the goal, the median share of updates that the contender
saves [95 %, bootstrap]; 100 % where only it gets there, never where only the other one does."""


def report(form_name: str, form: Form, out: Path, folder: Path, pictures: Path) -> Path:
    """Write results.md into `folder` and its pictures into `pictures`, a folder below it."""
    pictures.mkdir(parents=True, exist_ok=True)
    where = pictures.relative_to(folder).as_posix()
    found = collect(form, out)
    parts = [setup(form_name, form, found)]
    for task in found:
        parts.append(task_part(task, form, pictures, where))
    whole = [task for task in found if all(len(runs) == len(form.seeds) for runs in task.runs.values())]
    if whole:
        parts.insert(1, overall(whole, pictures, where))
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
    rates = ", ".join(f"{rate:g}" for rate in form.learning_rates)
    clips = ", ".join(f"{clip:g}" for clip in form.clip_ranges)
    size = f"{form.updates} updates of {form.prompts_per_update} prompts x {form.group_size} images"
    exam = len(PROMPTS) * form.each
    return f"""## How it was measured

    python -m trainer benchmark --form {form_name}

at commit {", ".join(commits) or "-"}. Every run: {size}, {form.steps} denoising steps, LoRA of rank 8, no guidance.
Learning rate (out of {rates}) and clip range (out of {clips}) were chosen for each contender and task by its mean gain
on the way in {form.tuning_updates} updates on seeds {_list(form.tuning_seeds)}, which are not reported, among the
settings that keep at least {100 * KEEPS:.0f} % of the base model's right objects at every exam.
Reported are seeds {_list(form.seeds)}. With the same seed all contenders see the same prompts and noise.
Every {form.every} updates, and before the first, comes an exam: {exam} pictures of the same noise, sampled without
noise (ODE). Gains are in standard deviations of the base model's rewards on these pictures. Brackets are 95 % bootstrap
intervals over seeds unless said otherwise. tempflow and guard are one credit (docs/paper.md). Tiny FD is taken from
{exam} pictures to {form.reference}, in emoji-align's features: compare it within a table only."""


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "(none: one setting)"


def tuning_part(form: Form, out: Path) -> str:
    """How much each setting gave, task by task; empty where nothing was tuned."""
    found = {tables.describe(task): tables.tuning(form, task, out) for task in tasks(form)}
    parts = [f"{name}:\n\n{text}" for name, text in found.items() if text]
    seeds = (
        f"By learning rate and clip range, on tuning seeds {_list(form.tuning_seeds)} only; bold was chosen. "
        f"In brackets what a setting kept of the base model's right objects, where less than {100 * KEEPS:.0f} %."
    )
    if not parts:
        return ""
    return "\n\n".join(["## Settings", seeds, *parts, EQUAL, tables.equal_settings(form, tasks(form), out)])


def overall(found: Sequence[Found], pictures: Path, where: str) -> str:
    """All contenders against native PPO and against PCPO, over the tasks of which every seed is finished."""
    parts = ["## All finished tasks together", "; ".join(tables.describe(task.task) for task in found) + "."]
    groups = []
    for task in found:
        effects = mixed(task.rows("gain"), tables.REFERENCES[0]).effects
        groups.append((tables.describe(task.task), [(name, effects[name]) for name in task.runs if name in effects]))
    figures.forest(
        groups, "Gain over native PPO", "difference in gain at the end, std of the base model's rewards, 95 % limits"
    ).save(pictures / "effects.png")
    parts.append(f"![Gain over native PPO]({where}/effects.png)")
    for reference in tables.REFERENCES:
        if all(reference in task.runs for task in found):
            text, model = tables.against(found, reference)
            spread = (
                f"Blocks (a seed of a task) differ by a std of {model.block_std:.2f}, runs by {model.residual_std:.2f}."
            )
            parts += [text, f"Limits by a random-intercept model (REML). {spread}"]
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
    rates = form.learning_rates
    for end, rate, side in (("upper", max(rates), "more"), ("lower", min(rates), "less")):
        edge = [CONTENDERS[n].title for n in found.runs if found.chosen[n][0] == rate]
        if edge and len(rates) > 1:
            notes.append(
                f"Chosen at the {end} end of the learning rates, so {side} might be better: {', '.join(edge)}."
            )
    return "\n\n".join(
        [
            f"## {tables.describe(found.task)}",
            *notes,
            f"![Convergence]({where}/{stem}-convergence.png)",
            tables.gains(found),
            tables.times(found, form),
            f"![Health]({where}/{stem}-health.png)",
            tables.health(found),
            f"![At matched reward]({where}/{stem}-matched.png)",
            f"When the gain reaches +{goal:g}:",
            tables.matched(found, goal),
        ]
    )


def best_goal(found: Found) -> float:
    """The largest goal that every contender reaches with at least half of its seeds, else the smallest goal."""
    most = [
        g for g in GOALS if all(2 * sum(r.reach(g) < 1e9 for r in runs) >= len(runs) for runs in found.runs.values())
    ]
    return max(most, default=GOALS[0])
