"""The page on tuning: the gain of every setting on the tuning seeds, and which choices lie on an edge of the sweep."""

from collections.abc import Sequence

from ..markdown import format_interval, format_number, markdown_table
from ..study.methods import STUDY_METHODS
from ..study.outcome import gain_within_limits
from ..study.statistics import t_interval
from ..study.studies import Setting
from ..study.tuning import Tuning, edges, load_result
from .collect import StudyResults, TaskResults

TUNING_INTRO = """Gain within the limits of diversity and distance, by KL weight and learning rate (columns), on the
tuning seeds only, which are not reported. All settings are run on the first seed, and the next value beyond the
sweep where a method's best settings lie on an edge of it; the best settings then, on all tuning seeds. Where the choice
lies on an edge of what was tried, the next value is run on all of them, too: one more learning rate on either side, and
KL weights as long as the largest is chosen. In brackets: the number of seeds, if fewer than the chosen setting's. The
chosen setting is bold; of those that were run on all tuning seeds it has the highest mean."""

LEFT_OUT = """\
Finished under earlier rules for the values beyond a sweep; under the present rule other settings are chosen, or these
are not tried."""


def tuning_page(studies: Sequence[StudyResults]) -> str:
    """Every task with a finished tuning run; empty without any."""
    parts = []
    for results in studies:
        tasks = [task for task in results.tasks if any(any(t.gains.values()) for t in task.tuning.values())]
        for task in tasks:
            parts.append(f"## {results.name}: {task.task.title}")
            parts += [tuning_table(task), edge_note(task)]
    if not parts:
        return ""
    left_out = [row for results in studies for row in left_out_rows(results)]
    if left_out:
        head = ["study", "task", "method", "learning rate, KL weight", "seeds", "gain within the limits"]
        parts += ["## Runs that nothing else reports", LEFT_OUT, markdown_table(head, left_out)]
    return "\n\n".join(["# Tuning", TUNING_INTRO, *parts])


def tuning_table(task: TaskResults) -> str:
    """A row per method and KL weight, a column per learning rate."""
    tried = {setting for tuning in task.tuning.values() for setting in tuning.gains}
    rates = sorted({setting.learning_rate for setting in tried})
    rows = []
    for name, tuning in task.tuning.items():
        if any(tuning.gains.values()):
            for weight in sorted({setting.kl_weight for setting in tuning.gains}):
                cells = (_cell(tuning, Setting(rate, weight)) for rate in rates)
                rows.append([STUDY_METHODS[name].title, f"{weight:g}", *cells])
    return markdown_table(["", "KL weight", *(f"{rate:g}" for rate in rates)], rows)


def _cell(tuning: Tuning, setting: Setting) -> str:
    gains = tuning.gains.get(setting)
    if not gains:
        return "-"
    number = format_number(sum(gains) / len(gains))
    if setting == tuning.chosen:
        return f"**{number}**"
    most = max(len(own) for own in tuning.gains.values())
    return number if len(gains) == most else f"{number} ({len(gains)})"


def edge_note(task: TaskResults) -> str:
    """The choices on an edge, outside of which a better setting may lie, and the methods whose tuning has begun."""
    titles: dict[str, list[str]] = {}
    for name, setting in task.chosen.items():
        for edge in edges(setting, task.tuning[name].gains):
            titles.setdefault(edge, []).append(STUDY_METHODS[name].title)
    lines = [f"Chosen at {edge} tried: {'; '.join(names)}." for edge, names in titles.items()]
    open_ = [STUDY_METHODS[name].title for name, tuning in task.tuning.items() if tuning.done and not tuning.chosen]
    if open_:
        lines.append(f"Tuning not finished: {'; '.join(open_)}.")
    return " ".join(lines) or "No choice lies on an edge of what was tried."


def left_out_rows(results: StudyResults) -> list[list[str]]:
    """The finished runs that are neither of the tuning nor reported, by task, method and setting."""
    rows = []
    for task in results.tasks:
        for name, tuning in task.tuning.items():
            folder = results.out / "cells" / task.task.recipe / task.task.reward / name
            found: dict[Setting, list[tuple[int, float]]] = {}
            for file in sorted(folder.glob("*/result.json")):
                result = load_result(file)
                setting, seed = Setting(**result["setting"]), result["cell"]["seed"]
                if setting not in tuning.gains if seed in results.study.tuning_seeds else setting != tuning.chosen:
                    gain = gain_within_limits(result["rows"], task.task.reward)
                    found.setdefault(setting, []).append((seed, gain))
            for setting, own in found.items():
                seeds = ", ".join(str(seed) for seed, _ in own)
                gain = format_interval(t_interval([gain for _, gain in own]))
                title = STUDY_METHODS[name].title
                rows.append([results.name, task.task.name, title, setting.title, seeds, gain])
    return rows
