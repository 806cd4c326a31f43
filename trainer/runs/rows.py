"""metrics.jsonl: one JSON object per update, appended and flushed; what a crash or an editor did to it is found."""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from comfyui_pcpo.json_text import parse_json

from ..config.schema import Config, RewardConfig

TABLES = {"rewards", "rewards_std", "held_out", "weights", "per_step", "guard", "model_evaluations", "seconds_rewards"}
MetricsRow = dict[str, Any]
RATING_UPDATES = 5
"""Updates that rate the checkpoint before them: prompts differ from one update to the next."""
LEAST_STD = 1e-8


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
    """A phrase for the missing and one for the repeated updates up to `done`."""
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


def best_update(rows: Sequence[MetricsRow], numbers: Collection[int], config: Config) -> int:
    """The update among `numbers` whose LoRA has the highest mean reward, by the weights that a schedule ends with.

    A row is of images that were sampled before its gradient steps, so a LoRA is rated by the rows that follow, up to
    RATING_UPDATES or the next regular checkpoint. The newest has none, and is best only if no other is rated.
    """
    weights = ranking_weights(rows, config.reward)
    means = {row["update"]: mean for row in rows if (mean := ranked_mean(row, weights)) is not None}

    def rating(number: int) -> float:
        following = range(number + 1, number + 1 + min(config.run.save_every, RATING_UPDATES))
        rated = [means[n] for n in following if n in means]
        return sum(rated) / len(rated) if rated else -math.inf

    return max(numbers, key=rating)


def ranking_weights(rows: Sequence[MetricsRow], reward: RewardConfig) -> dict[str, float]:
    """The trained rewards' last weights; where training standardises, per standard deviation of the first images.

    Those are the base model's. A reward whose first images all score alike is measured by the first that do not.
    """
    if not reward.standardises:
        return reward.last_weights
    spreads = {name: [row.get("rewards_std", {}).get(name) or 0.0 for row in rows] for name in reward.last_weights}
    deviations = {name: next((one for one in stds if one > LEAST_STD), 1.0) for name, stds in spreads.items()}
    return {name: weight / deviations[name] for name, weight in reward.last_weights.items()}


def ranked_mean(row: MetricsRow, weights: Mapping[str, float]) -> float | None:
    """The weighted sum of a row's mean rewards; None where all scores of one failed."""
    means = [row.get("rewards", {}).get(name) for name in weights]
    return None if None in means else sum(w * mean for w, mean in zip(weights.values(), means, strict=True))
