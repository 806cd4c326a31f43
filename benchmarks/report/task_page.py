"""The page of one task: convergence, time to a gain, health of the training, and image quality at equal gain."""

import math
from pathlib import Path

from ..study.grid import StudyTask, tuning_task
from ..study.methods import STUDY_METHODS
from ..study.recipes import RECIPES
from ..study.studies import Study
from .collect import GOALS, TaskResults
from .figures import TASK_FIGURES
from .markdown import format_list
from .tables import gain_table, health_table, held_out_table, matched_table, time_tables


def page_name(task: StudyTask) -> str:
    return task.name.replace("/", "-")


def task_page(results: TaskResults, study: Study, images: Path, where: str) -> str:
    """The page as Markdown; its figures are saved in `images`, which the page refers to as `where`."""
    stem = page_name(results.task)
    for kind, draw_figure in TASK_FIGURES.items():
        draw_figure(results).save(images / f"{stem}-{kind}.png")
    goal = best_goal(results)
    return "\n\n".join(
        [
            f"# {results.task.title}",
            *notes(results, study),
            f"![Convergence]({where}/{stem}-convergence.png)",
            gain_table(results),
            held_out_table(results),
            time_tables(results, study),
            "## Health of the training",
            f"![Clip fraction, gradient norm and Taylor error]({where}/{stem}-health.png)",
            health_table(results),
            "## Image quality at equal gain",
            f"![Image quality against the gain]({where}/{stem}-matched.png)",
            f"Where the kept gain reaches +{goal:g}, without the seeds that never reach it:",
            matched_table(results, goal),
        ]
    )


def notes(results: TaskResults, study: Study) -> list[str]:
    """What a reader must know about the runs: missing seeds, and where the settings come from."""
    unfinished = [STUDY_METHODS[n].title for n, runs in results.runs.items() if len(runs) < len(study.seeds)]
    lines = [f"Seeds are missing for {format_list(unfinished)}."] if unfinished else []
    source = tuning_task(study, results.task)
    if source != results.task:
        lines.append(f"The settings are those chosen for {source.title}.")
    return lines + sweep_edges(results, study)


def sweep_edges(results: TaskResults, study: Study) -> list[str]:
    """The methods whose chosen setting is at an end of the sweep, so that a better one may lie outside it."""
    sweep, lines = study.sweep[RECIPES[results.task.recipe].kind], []
    for part, what in enumerate(("learning rates", "clip ranges")):
        values = {setting[part] for setting in sweep}
        for end, value in (("upper", max(values)), ("lower", min(values))):
            names = [
                n for n in results.runs if results.chosen[n][part] == value and (STUDY_METHODS[n].clips or part == 0)
            ]
            if names and len(values) > 1:
                titles = format_list([STUDY_METHODS[n].title for n in names])
                lines.append(f"Chosen at the {end} end of the {what}: {titles}.")
    return lines


def best_goal(results: TaskResults) -> float:
    """The largest goal that at least half of the seeds of every method reach, else the smallest goal."""
    reached = [
        goal
        for goal in GOALS
        if all(2 * sum(math.isfinite(r.reach(goal)) for r in runs) >= len(runs) for runs in results.runs.values())
    ]
    return max(reached, default=GOALS[0])
