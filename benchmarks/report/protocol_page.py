"""The page that describes how the numbers were measured."""

from collections.abc import Sequence

from ..study.kept_gain import KEEPS
from ..study.recipes import STUDY_PROMPTS
from ..study.studies import Study
from .collect import TaskResults
from .markdown import format_list


def protocol_page(study_name: str, study: Study, results: Sequence[TaskResults], pages: Sequence[str]) -> str:
    """Runs, evaluation, gains, settings and statistics, and the list of pages."""
    links = "\n".join(f"- [{name}]({name}.md)" for name in pages)
    return "\n\n".join(
        [
            "# How the results were measured",
            f"    python -m benchmarks --study {study_name}",
            _runs_paragraph(study, results),
            _gains_paragraph(study),
            _settings_paragraph(study),
            _numbers_paragraph(study),
            f"## Pages\n\n{links}",
        ]
    )


def _runs_paragraph(study: Study, results: Sequence[TaskResults]) -> str:
    runs = [run for task in results for of_method in task.runs.values() for run in of_method]
    commits = format_list(sorted({run.result["commit"] for run in runs}))
    size = f"{study.updates} updates of {study.prompts_per_update} prompts x {study.group_size} images"
    return (
        f"""**Runs.** {size}, {study.steps} denoising steps, LoRA of rank 8, no guidance. Commits: {commits or "-"}."""
    )


def _gains_paragraph(study: Study) -> str:
    images = len(STUDY_PROMPTS) * study.images_per_prompt
    return f"""**Evaluation.** Before training and every {study.evaluate_every} updates, the model generates {images}
images of the training prompts, sampled without noise (ODE) and from the same initial noise each time. Gains are in
standard deviations of the base model's rewards in this evaluation.

**Kept gain.** A gain counts only while the images show their objects. If an evaluation has less than
{100 * KEEPS:.0f} % of the base model's correct objects, the *kept gain* remains that of the last evaluation above this
limit, as with early stopping. The *mean kept gain* is its mean over training (the area under its curve). Settings are
chosen and methods are compared by it. It counts objects only: a model that generates the same image of the right object
over and over loses nothing. Such a loss is visible in the column "diversity", but not in the kept gain."""


def _settings_paragraph(study: Study) -> str:
    sweeps = "; ".join(
        f"{kind}: " + ", ".join(f"({rate:g}, {clip:g})" for rate, clip in sweep) for kind, sweep in study.sweep.items()
    )
    tuning = format_list(study.tuning_seeds) or "none: there is one setting"
    return f"""**Settings.** Learning rate and clip range ({sweeps})
were chosen for each method and task on the tuning seeds ({tuning}), which are not reported. Reported seeds:
{format_list(study.seeds)}. For a given seed, all methods of a task use the same prompts and noise, except AWM and
DiffusionNFT, which also sample without noise in training and never share the first noise within a group."""


def _numbers_paragraph(study: Study) -> str:
    images = len(STUDY_PROMPTS) * study.images_per_prompt
    return f"""**Numbers.** Brackets are 95 % intervals over seeds: Student's t for means, bootstrap for medians. Times
are interpolated linearly between evaluations, so times below {study.evaluate_every} updates are estimates. tempflow and
guard are the same credit (see docs/paper.md). Correct objects, correct counts, tiny FD and diversity are measured by
emoji-align, whose cosine similarity is also the reward `alignment`. Tiny FD compares {images} images with
{study.reference_images}; compare it within a table only. With two minibatches, the first one is trained at a ratio of
1, so the clip fraction is at most 50 %. Seconds are wall-clock time with other processes running; compare updates and
images instead."""
