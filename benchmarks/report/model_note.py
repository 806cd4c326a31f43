"""A note on the pages of runs that used the former embedded models, of 64 x 64 pixels."""

from collections.abc import Sequence

from .collect import TaskResults

FORMER_PIXELS = 64
FORMER = "These runs used the former 64-pixel models; the current models are 128-pixel."


def with_model_note(page: str, results: Sequence[TaskResults]) -> str:
    """The page with the note under its title, if a run does not record its image size: those of the former models."""
    runs = [run for task in results for own in task.runs.values() for run in own]
    if not page or all("pixels" in run.result for run in runs):
        return page
    title, _, rest = page.partition("\n\n")
    return f"{title}\n\n{FORMER}\n\n{rest}"
