"""The command line of the benchmarks: `python -m benchmarks --help`."""

import json
import sys
from pathlib import Path
from typing import Literal

from cyclopts import App, CycloptsError, Parameter
from tqdm import tqdm

from trainer.cli.libraries import share_cores
from trainer.cli.main import discard_output, library_errors, report, version
from trainer.config.errors import ConfigError
from trainer.files import advice

benchmark_app = App(
    name="python -m benchmarks",
    version=version,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,  # handled by `run_command`
    help="Compare PCPO with its baselines on the embedded models, and measure speed and memory.",
)


Studies = Literal["quick", "frontier", "proportionality", "guard"]


@benchmark_app.default
def benchmark(
    *,
    study: Studies = "quick",
    out: Path = Path("output/benchmark"),
    part: Literal["all", "runs", "guidance", "speed", "report"] = "all",
    docs: Path | None = None,
) -> None:
    """Run a study; an interrupted study is resumed, and reported as far as it is finished.

    Several processes may share one folder: each cell is run by one of them.

    Parameters
    ----------
    study
        quick takes minutes; frontier (who gains most at the same price, and who follows prompts), proportionality
        (credit of the steps) and guard (against reward hacking) take hours of one CPU core and are reported together.
    out
        Folder of the results.
    part
        runs, guidance (two rewards combined), speed, or report (pages and figures of what is finished). all leaves out
        guidance and speed for proportionality and guard.
    docs
        Write the report into this folder, such as docs; the folder of the results if omitted.
    """
    from trainer.cli.libraries import quiet_libraries

    from .report.pages import REPORTED, write_report
    from .speed.loop_speed import run_speed
    from .study.files import commit, source_checksum
    from .study.studies import STUDIES
    from .study.two_rewards import run_two_rewards
    from .study.work import progress, work

    quiet_libraries()
    design, folder = STUDIES[study], out.resolve() / study
    folder.mkdir(parents=True, exist_ok=True)
    commit()  # cached before the checkout can change
    source_checksum()
    if part in ("all", "runs"):
        done, total = progress(design, folder)
        tqdm.write(f"{done} of {total} cells in {folder} are finished")
        work(design, folder, tqdm.write)
    everything = part == "all" and study in ("quick", "frontier")
    if everything or part == "guidance":
        run_two_rewards(design, folder, tqdm.write)
    if everything or part == "speed":
        run_speed(folder, tqdm.write)
    names = REPORTED if study in REPORTED else (study,)
    reported = write_report({name: STUDIES[name] for name in names}, out.resolve(), (docs or folder).resolve())
    tqdm.write(str(reported))


@benchmark_app.command
def archive(
    *,
    study: Studies,
    out: Path = Path("output/benchmark"),
    to: Path = Path("benchmarks/results"),
) -> None:
    """Write a study's finished runs to one file, STUDY.tar.xz; unpacked into --out, it is reported and continued.

    Parameters
    ----------
    study
        Whose runs.
    out
        Folder of the results.
    to
        Folder of the file.
    """
    from .study.archive import write_archive
    from .study.studies import STUDIES

    file = to / f"{study}.tar.xz"
    count = write_archive(STUDIES[study], out.resolve() / study, file)
    tqdm.write(f"{count} finished runs in {file}")


@benchmark_app.command
def full_size(
    *,
    estimate: bool = False,
    tiny: bool = False,
    device: str = "cuda",
    only: str | None = None,
    out: Path = Path("full_size.jsonl"),
) -> None:
    """Measure memory and speed of full-size models with random weights, on a GPU and without any download.

    Parameters
    ----------
    estimate
        Only do the arithmetic of `check`, which needs no GPU.
    tiny
        Small models of the same classes, to try the command.
    device
        Where the models run.
    only
        One model: sd15-512, sdxl-1024, sd35m-512, sd35m-1024, flux-512 or flux-1024.
    out
        JSON lines to write.
    """
    from .speed.full_size import FULL_SIZE, FullSizeOptions, run_full_size

    if only is not None and only not in FULL_SIZE:
        raise ConfigError(f"--only is {only}, but the models are {', '.join(FULL_SIZE)}. Use one of them.")
    run_full_size(FullSizeOptions(estimate, tiny, device, only), out, tqdm.write)


@benchmark_app.command
def pretend(*, only: str | None = None, out: Path = Path("pretended.jsonl")) -> None:
    """Run the ready configurations at full size on a pretended GPU: memory by phase, transfers and waits.

    Needs no GPU and no download; weights are shapes. Each model takes about a minute. Fails if one needs more memory
    than the GPU that it should fit.

    Parameters
    ----------
    only
        One model: sd15-512, sdxl-1024, sd35m-512, sd35m-1024, flux-512, flux-1024, qwen-512, z-image-512,
        z-image-1024, klein-1024 or chroma-512.
    out
        JSON lines; rows are appended.
    """
    from trainer.cli.libraries import quiet_libraries

    from .pretend.full_size import CASES, beyond_target, memory_table, pretend_case

    quiet_libraries()
    if only is not None and only not in CASES:
        raise ConfigError(f"--only is {only}, but the models are {', '.join(CASES)}. Use one of them.")
    rows = []
    for name in [only] if only else CASES:
        rows.append(pretend_case(name))
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
    tqdm.write(memory_table(rows))
    if beyond := beyond_target(rows):
        raise ConfigError(f"{beyond}. Use fewer images_at_once, a smaller rank, or quantize the model.")


@benchmark_app.command
def peers(
    *,
    ddpo: Path | None = None,
    flow_grpo: Path | None = None,
    updates: int = 10,
    rounds: int = 3,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = Path("output/benchmark"),
) -> None:
    """Compare the speed of our loop with that of public training scripts, on the embedded models.

    The report of the study frontier shows the result.

    Parameters
    ----------
    ddpo
        Folder of a clone of kvablack/ddpo-pytorch.
    flow_grpo
        Folder of a clone of yifan123/flow_grpo.
    updates
        Measured updates of each run.
    rounds
        Runs of each side; the table shows medians.
    device
        Where the models run.
    out
        Folder of the results.
    """
    from .speed.peer_scripts import PeerSettings
    from .speed.peer_speed import compare_with_peers, peer_table, write_peers
    from .study.files import commit

    clones = {"ddpo-pytorch": ddpo, "flow_grpo": flow_grpo}
    given = {name: clone.resolve() for name, clone in clones.items() if clone is not None}
    if not given or updates < 1 or rounds < 1:
        raise ConfigError("Give at least one clone (--ddpo, --flow-grpo), and --updates and --rounds of 1 or more.")
    commit()  # cached before the checkout can change
    rows = compare_with_peers(given, PeerSettings(updates=updates, device=device), rounds, tqdm.write)
    tqdm.write(peer_table(write_peers(rows, out.resolve() / "frontier" / "peers.json")))


def run_command(tokens: list[str] | None = None) -> int:
    """Run one command, -> exit status: 0 done, 2 error, 130 interrupted, 141 output closed."""
    share_cores()
    try:
        benchmark_app(tokens, result_action="return_value", exit_on_error=False)
        sys.stdout.flush()
    except ConfigError as error:
        return report(str(error))
    except BrokenPipeError:
        return discard_output()
    except OSError as error:
        return report(f"{error}. {advice(error)} Finished cells are intact.")
    except CycloptsError:  # already printed
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except library_errors() as error:
        return report(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command())
