"""The command line: thin commands over the library. Every error is one sentence, with exit status 2."""

import contextlib
import io
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter

from comfyui_pcpo.prompt import require_text

from ..config.errors import ConfigError
from ..config.loading import tomllib
from ..files import advice
from ..loop.interrupts import Interrupted, interrupts
from ..program import program_name
from . import images, rewards, runs, taste
from .libraries import filter_warnings, share_cores
from .progress import Stopped

COMMANDS = {
    "demo": runs.demo_command,
    "train": runs.train_command,
    "resume": runs.resume_command,
    "check": runs.check_command,
    "options": runs.options_command,
    "sample": images.sample_command,
    "plot": images.plot_command,
    "export": images.export_command,
    "evaluate": rewards.evaluate_command,
    "score": rewards.score_command,
    "taste": taste.TASTE,
    "ab": taste.ab_command,
    "download": rewards.download_command,
    "serve-reward": rewards.serve_reward_command,
}
BROKEN_PIPE = 141  # as a shell reports it: 128 + SIGPIPE


def version() -> str:
    """The version of the installed package, or of the pyproject.toml above this folder."""
    try:
        return metadata.version("comfyui-pcpo")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


def make_app() -> App:
    """The command line under the name it was called by."""
    app = App(
        name=program_name(),
        version=version,
        default_parameter=Parameter(negative=()),  # no --no-json, no --empty-prompt
        suppress_keyboard_interrupt=False,  # `main` handles it
        help="Align text-to-image models to a reward with proportionate credit (PCPO).",
    )
    for position, (name, command) in enumerate(COMMANDS.items()):
        if isinstance(command, App):
            command.sort_key = position
            app.command(command)
        else:
            app.command(command, name=name, sort_key=position)
    return app


def main(tokens: list[str] | None = None) -> int:
    """Run one command, -> exit status: 0 done, 2 error, 128 + N ended by signal N, 141 output closed."""
    with warnings.catch_warnings(), interrupts:
        filter_warnings()
        share_cores()
        escape_unprintable()
        try:
            require_text_arguments(sys.argv[1:] if tokens is None else tokens)
            find_own_modules()
            make_app()(tokens, result_action="return_value", exit_on_error=False)
            sys.stdout.flush()
        except CycloptsError:  # already printed, with the nearest option
            return 2
        except ConfigError as error:
            return report(str(error))
        except BrokenPipeError:
            return discard_output()
        except OSError as error:
            return report(f"{error}. {advice(error)} Finished checkpoints are intact.")
        except Stopped as stopped:
            return stopped.status
        except KeyboardInterrupt as error:
            with contextlib.suppress(OSError):
                print(f"\nstopped by {str(error) or 'Ctrl-C'}", file=sys.stderr)
            return error.status if isinstance(error, Interrupted) else 130
        except library_errors() as error:
            return report(str(error))
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            return report(f"out of memory: {error}. Ask for fewer images or steps at once, or a smaller size.")
    return 0


def require_text_arguments(tokens: list[str]) -> None:
    """Raise ConfigError for what could be neither printed nor recorded, such as bytes that are not UTF-8."""
    for token in tokens:
        try:
            require_text(token)
        except ValueError as error:
            raise ConfigError(f"argument {token!a} {error}.") from None


def find_own_modules() -> None:
    """Let rewards named module:Class be in the current folder, for `pcpo` as for `python -m trainer`."""
    with contextlib.suppress(FileNotFoundError):  # it was removed
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


def escape_unprintable() -> None:
    """Print what the output's encoding lacks, as on Windows when it goes to a file, as an escape, and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or another program has replaced it
            stream.reconfigure(errors="backslashreplace")


def report(message: str) -> int:
    """Print an error, -> exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def discard_output() -> int:
    """The reader of our output is gone, as in `options | head -1`: end without a message, -> exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python exits
    return BROKEN_PIPE


def library_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is meant for the user; looked up only after something was raised, since it imports torch."""
    import torch

    from comfyui_pcpo.metrics.errors import MetricError
    from comfyui_pcpo.reward.base import RewardError

    from ..loop.scoring import RunError

    return RewardError, MetricError, RunError, FloatingPointError, torch.OutOfMemoryError
