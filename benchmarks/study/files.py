"""JSON files of the results, and the code that they were made with: its commit, and a checksum of its sources."""

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("trainer/**/*.py", "comfyui_pcpo/**/*.py", "benchmarks/study/*.py")  # that decide a run


@cache
def commit(root: Path = REPOSITORY) -> str:
    """The checked-out commit, or the content of a file COMMIT, or `unknown`; cached before the code can change."""
    commit_file = root / "COMMIT"
    if commit_file.is_file():
        return commit_file.read_text(encoding="utf-8").strip()[:12]
    git = root / ".git"
    if git.is_file():  # a linked worktree
        git = root / git.read_text(encoding="utf-8").removeprefix("gitdir: ").strip()
    head = (git / "HEAD").read_text(encoding="utf-8").strip() if (git / "HEAD").is_file() else ""
    if not head.startswith("ref: "):
        return head[:12] or "unknown"
    common = git / (git / "commondir").read_text(encoding="utf-8").strip() if (git / "commondir").is_file() else git
    loose, packed = common / head[5:], common / "packed-refs"
    if loose.is_file():
        return loose.read_text(encoding="utf-8").strip()[:12]
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line[:12] for line in lines if line.endswith(head[5:])), "unknown")


@cache
def source_checksum(root: Path = REPOSITORY) -> str:
    """Checksum of the sources in use, which a modified checkout changes; cached before the code can change."""
    crc = 0
    for name in sorted({file.relative_to(root).as_posix() for pattern in SOURCES for file in root.glob(pattern)}):
        text = (root / name).read_text(encoding="utf-8")  # the same for either kind of line end
        crc = zlib.crc32(f"{name}\n{text}".encode(), crc)
    return f"{crc:08x}"


def write_json(file: Path, value: Any) -> None:
    """Write atomically, and make the folder: a killed process leaves the previous content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(file)


def with_nan(value: Any) -> Any:
    """`value` with NaN for null, as which JSON has it."""
    if isinstance(value, dict):
        return {key: with_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return list(map(with_nan, value))
    return math.nan if value is None else value


def read_json(file: Path, default: Any) -> Any:
    """Content of a file; the default if it is missing or truncated."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return default
