"""The page that describes how the numbers are measured, and how much of it is finished."""

from collections.abc import Sequence

from ..markdown import format_list, markdown_table
from ..study.grid import study_tasks, task_methods
from ..study.methods import CLIP_RANGE, STUDY_METHODS
from ..study.outcome import GOALS, LIMITS
from ..study.recipes import RECIPES
from ..study.studies import LARGER_KL, Setting, Study
from .collect import StudyResults

EVALUATION = f"""**Evaluation.** Before training and every few updates, the model generates images of its training
prompts without noise (ODE), from the same initial noise each time. Gains are in standard deviations of the base
model's rewards in this evaluation. Diversity is the mean cosine distance between images of a prompt, distance the
Frechet distance to images of the base model (tiny FD), both in emoji-align's features. "Distance, x" is relative to
what images of the base model themselves have. The reported runs of the studies on the frontier and on the guard, not
those of the tuning, are also evaluated on TinyEval's hard tasks, whose prompts are never trained.

**Outcome.** The gain within limits: where {LIMITS.lost_share} of the diversity is lost or the distance
reaches {LIMITS.far:g} x, whichever comes first, interpolated between evaluations; the last gain of a run that reaches
neither. Both limits are needed: images that are all alike have lost diversity, destroyed ones may even have gained
diversity. A gain's price is what is spent until the gain ({format_list(GOALS)}) is reached within the limits. A run
whose gradient or images overflow has lost all diversity from there on; its distance, correct images and TinyEval are
missing, and so are means over it.

**Settings.** Learning rate and KL weight are tuned for each method and task over the same sweep, on seeds that are not
reported, by the outcome above; where a method's best settings lie on an edge of it, by one more learning rate, and by
larger KL weights as long as the largest is the best (up to {LARGER_KL["flow"][-1]:g}, on ddim
{LARGER_KL["ddim"][-1]:g}). The clip range is {CLIP_RANGE:g} for
every method that clips: the trainer's default on the embedded models, wider than the published 1e-4 because their
latents are smaller. GRPO-Guard's credit is not rescaled, so the same number clips more of it. A seed sets the order
of the prompts for all methods of a task, and the noise where their rollouts are alike. No guidance; LoRA of rank 8;
two optimizer steps per update; the last denoising step is never trained.

**Methods.** Methods that are named so, "PCPO, early branch" and TempFlow-GRPO branch: they share the first noise of a
group. TempFlow-GRPO's branch has one stochastic step. "PCPO, early branch" has a branch of one step among the first
three, and groups of 16 images, which cost fewer model evaluations than the 8 images of methods without branches. AWM
and DiffusionNFT sample without noise and never share the first noise. "One step less": the last trained step is
dropped too. "With options": their images share the noise that is added to them, and 4 stratified noise levels are
trained in an update; AWM's likelihood is divided by its mean error; DiffusionNFT samples from an average of its LoRA,
which is also what is evaluated.

**Numbers.** Brackets are 95 % intervals over seeds, of three at least: Student's t for means, bootstrap for medians.
"p (Holm)" is corrected by Holm's method; each page says which comparisons are one family. emoji-align reads the
images, and the rewards `alignment` and `tinyeval` are its readings too."""


def protocol_page(studies: Sequence[StudyResults], pages: Sequence[str]) -> str:
    """Protocol, what is finished, and the list of pages."""
    links = "\n".join(f"- [{name}]({name}.md)" for name in pages) or "Nothing has been measured yet."
    designs = "\n\n".join(study_paragraph(one.name, one.study) for one in studies)
    parts = ["# How the results are measured", EVALUATION, "## Studies", designs, "## Finished runs"]
    return "\n\n".join([*parts, finished_table(studies), commits(studies), f"## Pages\n\n{links}"])


def study_paragraph(name: str, study: Study) -> str:
    """One study's sizes, sweep and seeds."""
    size = f"{study.updates} updates of {study.prompts_per_update} prompts x {study.group_size} images"
    for reward, budget in study.budgets.items():
        size += f" (reward {reward}: as many updates as make {budget} model evaluations)"
    own = [_own_steps(recipe) for recipe, _ in study.tasks if "steps" in RECIPES[recipe].rollout]
    steps = f"{study.steps} denoising steps ({'; '.join(own)})" if own else f"{study.steps} steps"
    sweeps = "; ".join(f"{kind}: {_sweep(settings)}" for kind, settings in study.sweep.items())
    rungs = format_list([f"{rung.settings or 'all'} on seed {rung.seed}" for rung in study.tuning])
    tuning = f"settings on the tuning seeds: {rungs}" if study.tuning else "no tuning"
    if study.tuned_once:
        tuning += f" ({format_list(study.tuned_once)}, whose runs are long: on seed {study.tuning_seeds[0]} alone)"
    evaluation = f"evaluated {study.evaluations} times with {study.images} images, distance to {study.reference_images}"
    seeds = f"reported seeds {format_list(study.seeds)}"
    wave = ""
    if study.later:
        first, later = ("; ".join(STUDY_METHODS[one].title for one in own) for own in study.waves)
        wave = f" First wave: {first}. Later: {later}."
    return f"**{name}.** {size}, {steps}, {evaluation}. Sweep ({sweeps}); {tuning}; {seeds}.{wave}"


def _own_steps(name: str) -> str:
    recipe = RECIPES[name]
    share = f", {100 * recipe.train_steps:.0f} % of them, drawn at random, trained in an update"
    return f"{name}: {recipe.rollout['steps']}{share if recipe.train_steps < 1 else ''}"


def _sweep(settings: Sequence[Setting]) -> str:
    rates, weights = (
        format_list([f"{value:g}" for value in dict.fromkeys(values)])
        for values in ([one.learning_rate for one in settings], [one.kl_weight for one in settings])
    )
    return f"learning rates {rates}; KL weights {weights}"


def finished_table(studies: Sequence[StudyResults]) -> str:
    """Reported and tuning runs by study and task, and how many methods have all of their seeds."""
    rows = []
    for results in studies:
        for task, one in zip(study_tasks(results.study), results.tasks, strict=True):
            methods, seeds = task_methods(results.study, task), len(results.study.seeds)
            whole = f"{sum(results.has_every_seed(one, name) for name in methods)} of {len(methods)}"
            reported = f"{sum(map(len, one.runs.values()))} of {seeds * len(methods)}"
            tuned = one.tuning.values()
            tuning = f"{sum(own.done for own in tuned)} of {sum(own.planned for own in tuned)}"
            rows.append([f"{results.name}, {task.name}", tuning, reported, whole])
    return markdown_table(["study, task", "tuning runs", "reported runs", "finished methods"], rows)


def commits(studies: Sequence[StudyResults]) -> str:
    made = {
        run.result["commit"] for one in studies for task in one.tasks for runs in task.runs.values() for run in runs
    }
    return f"Commits of the reported runs: {format_list(sorted(made)) or 'none'}."
