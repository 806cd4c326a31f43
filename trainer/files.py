"""Files that survive a crash: written beside their place, flushed to disk, then renamed. Equal content, equal bytes."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .config.errors import ConfigError

Bytes = bytes | memoryview
READ_SIZE = 1 << 20


def write_durably(path: Path, *parts: Bytes) -> None:
    """Write a whole file or none: a crash at any moment leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def safetensors_parts(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> list[Bytes]:
    """A safetensors file as the library writes it, but with its metadata sorted; the library's order is random."""
    from safetensors.torch import save

    data = memoryview(save({name: t.contiguous() for name, t in tensors.items()}, dict(metadata or {}) or None))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, data[8 + length :]]


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


def sampled_digest(path: Path, blocks: int = 16, size: int = 1 << 16) -> str:
    """A fingerprint of a large file from its size and evenly spaced blocks; it reads at most 1 MiB."""
    length = path.stat().st_size
    found = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        for n in range(blocks):
            file.seek(max(0, length - size) * n // (blocks - 1))
            found.update(file.read(size))
    return found.hexdigest()


def require_writable(path: Path, option: str, replace: bool = True) -> Path:
    """`path`, after trying to write there; nothing of the trial is left. Raises ConfigError before any work is done.

    With `replace` false an existing file is refused.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long
        raise ConfigError(f"{option} {path} is a folder. Give a file name in it.")
    if not replace and os.path.exists(path):
        raise ConfigError(f"{option} {path} exists and is not overwritten. Give another name, or add --overwrite.")
    missing = [folder for folder in path.parents if not folder.exists()]
    nearest = next(folder for folder in path.parents if folder not in missing)
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
