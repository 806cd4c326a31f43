"""The command `benchmark`: hands over to the repository's benchmarks/, which an installed package does not carry."""

import importlib
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from ..config.schema import ConfigError


def benchmark(
    *,
    form: Literal["quick", "medium", "full"] = "quick",
    out: Path = Path("output/benchmark"),
    part: Literal["all", "convergence", "guidance", "speed", "report"] = "all",
    docs: Path | None = None,
) -> None:
    """Compare PCPO with its baselines on the embedded models; goes on where it stopped.

    Several processes may work on one folder at the same time: each cell is done by one of them.

    Parameters
    ----------
    form
        quick takes minutes, medium hours, full days of one CPU core.
    out
        Folder of the results.
    part
        convergence, guidance (two rewards composed), speed, or report: only draw and tabulate what there is.
    docs
        Also write results.md and its pictures into this folder, such as docs.
    """
    try:
        suite = importlib.import_module("benchmarks.suite")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is missing: the benchmark belongs to the repository, not to the installed package. "
            "Clone it, `pip install -e .[dev]`, and run `python -m trainer benchmark` in its folder."
        ) from None
    suite.run(form, out.resolve(), part, docs, tqdm.write)
