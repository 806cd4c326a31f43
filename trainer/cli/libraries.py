"""The libraries behind the commands: silent, without hiding our own warnings, and with threads that share the cores."""

import logging
import os
import sys
import warnings
from typing import Any, TextIO

from tqdm import tqdm

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "open_clip", "huggingface_hub")


def share_cores() -> None:
    """Call before torch is imported: OpenMP's idle threads spin shortly, unless the user has said otherwise.

    By default they spin for long, which slows everything down tenfold as soon as other programs need the cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def quiet_libraries() -> None:
    """Call before a model is loaded: imports diffusers and transformers, and turns off their logs and bars."""
    from diffusers.utils import logging as diffusers_logging

    quiet_transformers()
    logging.getLogger("peft").setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def quiet_transformers() -> None:
    """As `quiet_libraries`, for commands that load rewards but no diffusion model."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def filter_warnings() -> None:
    """Ignore warnings raised inside the libraries, and print all others in one line."""
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = show_warning
    logger = logging.getLogger("comfyui_pcpo")
    if not logger.handlers:
        logger.addHandler(LogLines())
        logger.propagate = False


class LogLines(logging.Handler):
    """Prints what the library logs, such as that it waits for a server, as `show_warning` does."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            show_warning(record.getMessage())


def show_warning(message: Warning | str, *_: Any, file: TextIO | None = None, **__: Any) -> None:
    """Print a warning without its source line, above a progress bar if there is one."""
    tqdm.write(f"warning: {message}", file=file or sys.stderr)
