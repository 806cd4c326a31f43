"""Digests of files, and paths that are tried before work begins."""

import errno
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from comfyui_pcpo.durable import Bytes

from .config.errors import ConfigError

READ_SIZE = 1 << 20
ADVICE = {errno.ENOSPC: "Free some disk space.", errno.EFBIG: "Use another disk, or raise the limit on file sizes."}


def digest(parts: list[Bytes]) -> dict[str, Any]:
    """Size and SHA-256 of a file's parts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return {"bytes": sum(len(part) for part in parts), "sha256": found.hexdigest()}


def digest_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_SIZE):
            found.update(block)
    return {"bytes": path.stat().st_size, "sha256": found.hexdigest()}


def advice(error: OSError) -> str:
    """What to do about an error of the operating system."""
    return ADVICE.get(error.errno or 0, "Check the path and its permissions.")


def require_writable(path: Path, option: str, replace: bool = True) -> Path:
    """`path`, after trying to write there; nothing of the trial is left. Raises ConfigError before any work is done.

    With `replace` false an existing file is refused.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long
        raise ConfigError(f"{option} {path} is a folder. Give a file name in it.")
    if not replace and os.path.exists(path):
        raise ConfigError(f"{option} {path} exists and is not overwritten. Give another name, or add --overwrite.")
    missing = [folder for folder in path.parents if not folder.exists()]
    nearest = next((folder for folder in path.parents if folder not in missing), None)
    if nearest is None:
        raise ConfigError(
            f"{option} {path} cannot be written: {path.anchor or path} does not exist. Give another path."
        )
    if not nearest.is_dir():
        raise ConfigError(f"{option} {path} cannot be written: {nearest} is a file, not a folder. Give another path.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.stat()  # fails for a name that is too long
        tempfile.TemporaryFile(dir=path.parent).close()
        if os.path.exists(path):
            path.open("ab").close()
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written: {error.strerror or error}. Give another path, or free this one."
        ) from None
    finally:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
    return path
