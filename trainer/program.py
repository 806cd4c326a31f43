"""The name of the program, for messages that tell the user which command to run."""

import sys
from pathlib import PureWindowsPath


def program_name() -> str:
    """The command as it was called: `pcpo`, or `python -m trainer` in a clone and inside ComfyUI."""
    # a Windows path also splits at "/"
    if PureWindowsPath(sys.argv[0]).stem == "pcpo":
        return "pcpo"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.endswith("trainer.__main__"):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return "python -m trainer"
