"""JSON files of the results, and the commit that they were made at."""

import json
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


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


def write_json(file: Path, value: Any) -> None:
    """Write atomically: a killed process leaves the previous content."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(file)


def read_json(file: Path, default: Any) -> Any:
    """Content of a file; the default if it is missing or truncated."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return default
