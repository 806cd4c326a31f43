"""All parts of the benchmark, in order."""

from collections.abc import Callable
from pathlib import Path

from .report.report import report
from .speed import speed
from .study import guidance
from .study.cells import commit
from .study.methods import FORMS
from .study.work import progress, work


def run(form_name: str, out: Path, part: str, docs: Path | None, say: Callable[[str], None]) -> None:
    """Do the wanted part (or all) of a form; what is finished already is not done again."""
    form, out = FORMS[form_name], out / form_name
    out.mkdir(parents=True, exist_ok=True)
    commit()  # read before the checkout can change
    if part in ("all", "convergence"):
        done, total = progress(form, out)
        say(f"{done} of {total} cells are finished in {out}")
        work(form, out, say)
    if part in ("all", "guidance"):
        guidance.run(form, out, say)
    if part in ("all", "speed"):
        speed.run(out, say)
    folder = (docs or out).resolve()
    say(str(report(form_name, form, out, folder, folder / ("images/results" if docs else "images"))))
