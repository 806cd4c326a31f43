"""The page on two rewards: fronts of the three ways to combine them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting.panels import Line, LineStyle, Panel, draw_panels
from trainer.config.schema import ConfigError

from ..markdown import format_interval, markdown_table
from ..study.files import with_nan
from ..study.methods import OURS, STUDY_METHODS
from ..study.outcome import Row, gain
from ..study.recipes import RECIPES
from ..study.statistics import value_range
from ..study.two_rewards import DOUBLE, FIRST, MIXES, RECIPE, SECOND, Weights

TITLES = {"irg": "IRG", "sum": "LoRA weights summed", "both": "trained on both"}
COLUMNS = (("right", "correct images", 3), ("alignment", "alignment", 3), ("fd_base", "FD to base model", 0))


def weighted_mean(row: Row, before: Row) -> float:
    """Mean of both gains, weighted as requested."""
    gains = [gain(row, before, reward) for reward in (FIRST, SECOND)]
    return sum(w * g for w, g in zip(row["weights"], gains, strict=True)) / sum(row["weights"])


def points(rows: list[Row], way: str) -> dict[Weights, list[Row]]:
    """Rows of one way to combine the rewards by weights, one per seed."""
    by_weights: dict[Weights, list[Row]] = {}
    for row in rows:
        if row["way"] == way:
            first, second = row["weights"]
            by_weights.setdefault((first, second), []).append(row)
    return by_weights


def front_figure(front: Row) -> Image.Image:
    """First reward against the second along each front, and the correct images; means over seeds."""
    before, lines, right = front["before"], [], []
    looks: tuple[tuple[str, tuple[Weights, ...], str, LineStyle], ...] = (
        ("both", MIXES, "", "points"),
        ("irg", MIXES, "", "points"),
        ("sum", MIXES, "", "points"),
        ("irg", DOUBLE, ", double weights", "dashed"),
        ("sum", DOUBLE, ", double weights", "dashed"),
    )
    for way, weights, more, style in looks:
        groups = [rows for w, rows in points(front["rows"], way).items() if w in weights]
        color, title = list(TITLES).index(way), TITLES[way] + more
        x, y, kept = (
            [float(np.mean([of(row) for row in rows])) for rows in groups]
            for of in (
                lambda row: gain(row, before, FIRST),
                lambda row: gain(row, before, SECOND),
                lambda row: row["right"],
            )
        )
        lines.append(Line(title, x, y, style=style, color=color))
        right.append(Line(title, [w[0] / sum(w) for w in weights], kept, style=style, color=color))
    seeds = f"{len({row['seed'] for row in front['rows']})} seeds, means"
    return draw_panels(
        [
            Panel("Front of two rewards", f"gain in {FIRST}, std", f"gain in {SECOND}, std", lines, note=seeds),
            Panel("Right images", f"share of {FIRST}", "share of images", right, hlines=(before["right"],)),
        ],
        size=(560, 420),
    )


def front_table(front: Row) -> str:
    """Gains and image quality by way and weights, means and ranges over seeds."""
    before, rows = front["before"], []
    for way, title in TITLES.items():
        for weights, group in points(front["rows"], way).items():
            if way != "both" and weights in (MIXES[0], MIXES[-1]):
                continue  # a single LoRA at weight 1 equals the run trained on one reward
            gains = [format_interval(value_range([gain(row, before, r) for row in group])) for r in (FIRST, SECOND)]
            mean = format_interval(value_range([weighted_mean(row, before) for row in group]))
            quality = [
                format_interval(value_range([row[key] for row in group]), digits)
                for key, _, digits in (*COLUMNS, ("diversity", "", 3))
            ]
            rows.append([title, "{:g}, {:g}".format(*weights), *gains, mean, *quality])
    head = ["", "weights", f"gain in {FIRST}", f"gain in {SECOND}", "weighted mean"]
    return markdown_table([*head, *(title for _, title, _ in COLUMNS), "diversity"], rows)


def two_rewards_page(out: Path, images: Path, where: str) -> str:
    """The page; empty if the experiment was not run. Raises ConfigError if the file is about other rewards."""
    file = out / "guidance.json"
    if not file.is_file():
        return ""
    front = with_nan(json.loads(file.read_text(encoding="utf-8")))
    if front.get("rewards") != [FIRST, SECOND]:
        raise ConfigError(
            f"{file} is about {front.get('rewards')}, not {FIRST} and {SECOND}. "
            f"Remove it and {out / 'guidance'} to run the experiment again."
        )
    front_figure(front).save(images / "guidance.png")
    seeds = len({row["seed"] for row in front["rows"]})
    how = f"{RECIPES[RECIPE].title}, learning rate {front['setting']['learning_rate']:g}"
    return f"""# Two rewards at once

Two LoRAs trained by {STUDY_METHODS[OURS].title} ({how}),
one per reward, are combined at inference: by implicit reward guidance (IRG) or by summing their weights. "Trained on
both" is a LoRA trained on the weighted sum of the rewards. Its training takes equally long at any weights, so compare
whole fronts rather than rows. IRG costs one more model call per LoRA and step; the other two cost nothing extra.

{seeds} seeds; brackets are their range. Commit {front["commit"]}.

![Fronts of two rewards]({where}/guidance.png)

{front_table(front)}"""
