"""metrics.jsonl: one JSON object per update, appended and flushed; what a crash or an editor did to it is found."""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from comfyui_pcpo.json_text import parse_json

TABLES = {"rewards", "held_out", "weights", "per_step", "guard", "model_evaluations", "seconds_rewards"}
MetricsRow = dict[str, Any]


def read_rows(file: Path) -> tuple[list[MetricsRow], list[int]]:
    """All rows that can be read, and the numbers of the lines that cannot, from 1."""
    if not file.is_file():
        return [], []
    rows, damaged = [], []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get("update")) is int and has_metrics(row):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def has_metrics(row: MetricsRow) -> bool:
    """Whether every value is of the kind that a run records, so that nothing else needs to ask."""
    if not all(isinstance(row[key], dict) for key in TABLES & row.keys()):
        return False
    lists = all(isinstance(values, list) for values in row.get("per_step", {}).values())
    return lists and all(map(is_metric, row.values()))


def is_metric(value: Any) -> bool:
    """Whether a row can have this: a finite number, null, a text or a switch, or a table or list of these."""
    if isinstance(value, dict | list):
        return all(map(is_metric, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) < 1e300


def row_problems(file: Path, done: int) -> list[str]:
    """A sentence for every update up to `done` that is not there exactly once."""
    counts = Counter(row["update"] for row in read_rows(file)[0])
    missing = [n for n in range(1, done + 1) if not counts[n]]
    doubled = [n for n in range(1, done + 1) if counts[n] > 1]
    return [
        f"{file.name} {what} the row of update {numbers[0]}" + (f" and {len(numbers) - 1} more" if numbers[1:] else "")
        for what, numbers in (("lacks", missing), ("repeats", doubled))
        if numbers
    ]


def append_record(file: Path, row: MetricsRow) -> None:
    """Add a row and flush it to disk, or leave the file as it was."""
    size = file.stat().st_size if file.is_file() else 0
    try:
        with file.open("ab") as out:
            out.write(row_line(row).encode())
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        if file.is_file():
            os.truncate(file, size)
        raise


def row_line(row: MetricsRow) -> str:
    """One JSON line; NaN and infinity become null, which every JSON reader takes."""
    return json.dumps(finite(row)) + "\n"


def finite(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
