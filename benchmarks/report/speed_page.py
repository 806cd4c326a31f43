"""The page on speed and memory of the loop."""

import json
import statistics
from pathlib import Path
from typing import Any

from PIL import Image

from comfyui_pcpo.plotting.panels import Line, Panel, draw_panels

from ..markdown import format_number, markdown_table
from ..speed.loop_speed import BASE, LABELS, REPEATS, SPEED_MODELS, base_value, is_base, point_file, speed_points
from ..speed.peer_speed import peer_table
from ..study.files import read_json


def growth_figure(rows: list[dict[str, Any]]) -> Image.Image:
    """Seconds per update of the loop and of the reference loop along each axis."""
    panels = []
    for axis, label in LABELS.items():
        lines = []
        for color, model in enumerate(SPEED_MODELS):
            points = axis_points([row for row in rows if row["model"] == model], axis)
            x = [value for value, _ in points]
            if points:
                lines.append(Line(model, x, [row["whole"] for _, row in points], style="points", color=color))
                calls = [row["least"] for _, row in points]
                lines.append(Line(f"{model}, model calls only", x, calls, style="dashed", color=color))
        panels.append(Panel(f"Seconds per update by {label}", label, "CPU seconds", lines))
    return draw_panels(panels, columns=2, size=(520, 340))


def axis_points(rows: list[dict[str, Any]], axis: str) -> list[tuple[int, dict[str, Any]]]:
    """Values on an axis and their rows; the base is on every axis."""
    on_axis = [(row["value"], row) for row in rows if row["axis"] == axis]
    base = [(base_value(axis), row) for row in rows if row["axis"] != axis and is_base(row["axis"], row["value"])]
    return sorted(on_axis + base, key=lambda point: point[0])


def speed_page(out: Path, images: Path, where: str) -> str:
    """The page; empty if nothing was measured."""
    parts = [part for part in (peers_part(out), loop_part(out, images, where)) if part]
    return "\n\n".join(["# Speed and memory", *parts]) if parts else ""


def peers_part(out: Path) -> str:
    """Our loop against public training scripts; empty if they were not measured."""
    rows = read_json(out / "peers.json", [])
    if not rows:
        return ""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"""## Against public training scripts

Commit {commits}. The scripts run unchanged from clones, on the embedded model and at the sizes of our loop: one CPU
thread, in turn with our loop, medians; "relative" is the median of the
rounds' ratios, not the ratio of these medians. What a script does not set is our default.

{peer_table(rows)}"""


def loop_part(out: Path, images: Path, where: str) -> str:
    """Our loop against its bare model calls, as sizes grow; empty if it was not measured."""
    folder = out / "speed"
    files = [file for point in speed_points() if (file := point_file(folder, point)).is_file()]
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not rows:
        return ""
    growth_figure(rows).save(images / "speed.png")
    head = ["", "", "rollout, ms per image", "update, ms per trained transition", "outside model calls", "peak memory"]
    lines = [
        [
            row["model"],
            "base" if is_base(row["axis"], row["value"]) else f"{LABELS[row['axis']]} {row['value']}",
            format_number(1e3 * row["rollout"] / row["images"], 1),
            format_number(1e3 * row["update"] / row["transitions"], 1),
            f"{100 * row['outside']:.1f} %",
            f"{row['peak']:.0f} MB ({row['peak'] - row['loaded']:+.0f})",
        ]
        for row in rows
    ]
    outside = [100 * row["outside"] for row in rows]
    middle = f"{statistics.median(outside):.1f} %, from {min(outside):.1f} to {max(outside):.1f} %"
    counts = {key: value for key, value in BASE.items() if key not in ("height", "width")}
    size = ", ".join(
        [*(f"{LABELS.get(key, 'prompts')} {value}" for key, value in counts.items()), f"{BASE['height']} pixels"]
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"""## Against bare model calls

Commit {commits}. One CPU thread, CPU seconds of the process, medians of {REPEATS} updates, each followed by
`benchmarks/speed/reference_loop.py`, which makes the same model calls forward and backward and nothing else. Rollout
and update are separated by their shares of the wall-clock time. Base: {size}; each other
row changes one of these. A model call has at most the images of a minibatch, which are half of an update's.
Memory is the peak of the process after one update; in brackets, what the loop adds to the loaded model.

Time outside model calls: median {middle}.

![Seconds per update]({where}/speed.png)

{markdown_table(head, lines)}"""
