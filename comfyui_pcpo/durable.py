"""Files that survive a crash: written beside their place, flushed to disk, then renamed. Equal content, equal bytes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Bytes = bytes | memoryview


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
