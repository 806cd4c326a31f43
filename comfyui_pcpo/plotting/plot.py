"""Pictures of a run: curves, credit per step, captioned grids, before and after."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from comfyui_pcpo.plotting.canvas import COLORS, DOWN, INK, MUTED, PAPER, UP, Canvas, text_width, wrap
from comfyui_pcpo.plotting.figure import Line, Panel, figure

Record = Mapping[str, Any]


def smooth(values: Sequence[float], amount: float) -> list[float]:
    """Exponential mean with its start corrected; NaN stays NaN and leaves the mean alone.

    m_i = amount m_{i-1} + (1 - amount) v_i,  result m_i / (1 - amount^i)
    """
    if not 0 <= amount < 1:
        raise ValueError(f"smoothing is {amount}, but must be at least 0 and below 1. 0.6 is a good start.")
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = amount * mean + (1 - amount) * value, amount * weight + (1 - amount)
        found.append(mean / weight if math.isfinite(value) else math.nan)
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, Real) else math.nan


def column(records: Sequence[Record], *path: str) -> list[float]:
    """One metric of all records by its path, NaN where a record lacks it."""
    found = []
    for record in records:
        value: object = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found.append(_number(value))
    return found


def _names(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in (record.get(key) or {})))


def _checked(records: Sequence[Record], what: str = "metrics.jsonl") -> Sequence[Record]:
    if not records:
        raise ValueError(f"{what} has 0 records, but a curve needs at least 1. Train for one update first.")
    return records


def _smoothed(label: str, x: Sequence[float], y: Sequence[float], amount: float, color: int) -> list[Line]:
    """The values as a faint line under their smooth one."""
    main = Line(label, x, smooth(y, amount), color=color)
    return [Line("", x, y, style="faint", color=color), main] if amount > 0 else [main]


def _held_out(records: Sequence[Record], amount: float) -> list[Line]:
    """Held-out rewards; they are not measured in every update, so their line joins what was."""
    found = []
    for k, name in enumerate(_names(records, "held_out")):
        pairs = zip(column(records, "update"), column(records, "held_out", name), strict=True)
        known = [(x, y) for x, y in pairs if math.isfinite(y)]
        x, y = [p[0] for p in known], smooth([p[1] for p in known], amount)
        found.append(Line(f"{name} (held out)", x, y, style="dashed", color=1 + k))
    return found


def _seconds(records: Sequence[Record]) -> np.ndarray:
    """Time from the start of the run to the end of each update."""
    parts = [column(records, key) for key in ("seconds_rollout", "seconds_reward", "seconds_update")]
    return np.cumsum(np.nansum(np.array(parts), axis=0))


def _duration(records: Sequence[Record]) -> str:
    seconds = float(_seconds(records)[-1])
    units = ((3600, "h", 1), (60, "min", 0), (1, "s", 0))
    size, unit, digits = next(u for u in units if seconds >= 2 * u[0] or u[0] == 1)
    return f"{len(records)} update{'s' * (len(records) > 1)} in {seconds / size:.{digits}f} {unit}"


def _reward_panels(records: Sequence[Record], smoothing: float) -> list[Panel]:
    """The trained reward with its spread and the held-out ones; with several rewards also one panel for each."""
    x, names = column(records, "update"), _names(records, "rewards")
    mean, spread = smooth(column(records, "reward_mean"), smoothing), smooth(column(records, "reward_std"), smoothing)
    low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
    label = names[0] if len(names) == 1 else "total"
    lines = _smoothed(label, x, column(records, "reward_mean"), smoothing, 0)
    lines[-1] = replace(lines[-1], low=low, high=high)
    others = {"right": _held_out(records, smoothing), "right_label": "held-out reward", "note": _duration(records)}
    found = [Panel("Reward", "update", "mean and std of the images", lines, **others)]
    for name in names if len(names) > 1 else ():
        lines = _smoothed("", x, column(records, "rewards", name), smoothing, 0)
        found.append(Panel(f"Reward: {name}", "update", "mean", lines))
    return found


def _scalar_panel(records: Sequence[Record], key: str, title: str, label: str, smoothing: float) -> Panel:
    return Panel(title, "update", label, _smoothed("", column(records, "update"), column(records, key), smoothing, 0))


def per_step(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps, and a metric per step averaged over the last quarter of a run: T indices, T values."""
    last = records[-max(1, len(records) // 4) :]
    found: dict[int, list[float]] = {}
    for record in last:
        table = record.get("per_step") or {}
        for step, value in zip(table.get("steps", ()), table.get(key) or (), strict=False):
            found.setdefault(int(step), []).append(_number(value))
    known = {step: [v for v in values if math.isfinite(v)] for step, values in found.items()}
    return sorted(known), [float(np.mean(known[s])) if known[s] else math.nan for s in sorted(known)]


def _per_step_panel(records: Sequence[Record]) -> Panel:
    clip, norm = per_step(records, "clip_fraction"), per_step(records, "grad_norm")
    return Panel(
        "Per denoising step",
        "denoising step, noise first",
        "clip fraction",
        [Line("clip fraction", *clip, color=5)],
        bars=True,
        right=[Line("gradient norm", *norm, style="points", color=1)],
        right_label="gradient norm",
        note="mean of the last quarter",
    )


def curves(
    records: Sequence[Record],
    smoothing: float = 0.6,
    panels: Sequence[str] = ("reward", "clip", "kl", "per_step"),
) -> Image.Image:
    """The picture of a run from the rows of its metrics.jsonl."""
    _checked(records)
    known: dict[str, Callable[[], list[Panel]]] = {
        "reward": lambda: _reward_panels(records, smoothing),
        "clip": lambda: [_scalar_panel(records, "clip_fraction", "Clip fraction", "share of clipped terms", smoothing)],
        "kl": lambda: [_scalar_panel(records, "kl", "KL to the reference", "KL per step, mean over latent", smoothing)],
        "per_step": lambda: [_per_step_panel(records)],
    }
    for name in panels:
        if name not in known:
            raise ValueError(f"panel '{name}' is not one of {', '.join(known)}. Name one of these.")
    return figure([panel for name in panels for panel in known[name]()])


def _minutes(records: Sequence[Record]) -> list[float]:
    return list(_seconds(records) / 60)


def compare_runs(runs: Mapping[str, Sequence[Record]], smoothing: float = 0.6) -> Image.Image:
    """Several runs in one picture: reward by update and by time, clip fraction, KL, clip and gradient per step."""
    if not runs:
        raise ValueError("compare_runs got 0 runs, but needs at least 1. Give {name: records}.")
    for name, records in runs.items():
        _checked(records, f"run '{name}'")

    def lines(key: str, x: Callable[[Sequence[Record]], Sequence[float]]) -> list[Line]:
        each = [_smoothed(n, x(r), column(r, key), smoothing, k) for k, (n, r) in enumerate(runs.items())]
        return [line for group in each for line in group]

    def steps(key: str) -> list[Line]:
        return [Line(n, *per_step(r, key), style="points", color=k) for k, (n, r) in enumerate(runs.items())]

    def updates(records: Sequence[Record]) -> list[float]:
        return column(records, "update")

    step, quarter = "denoising step, noise first", "mean of the last quarter"
    return figure(
        [
            Panel("Reward", "update", "mean reward", lines("reward_mean", updates)),
            Panel("Reward by wall clock", "minutes", "mean reward", lines("reward_mean", _minutes)),
            Panel("Clip fraction", "update", "share of clipped terms", lines("clip_fraction", updates)),
            Panel("KL to the reference", "update", "KL per step, mean over latent", lines("kl", updates)),
            Panel("Clip fraction per step", step, "clip fraction", steps("clip_fraction"), note=quarter),
            Panel("Gradient norm per step", step, "gradient norm", steps("grad_norm"), note=quarter),
        ]
    )


# Credit


def _untrained(count: int, trained: Sequence[int]) -> list[tuple[float, float]]:
    return [(i - 0.5, i + 0.5) for i in range(count) if i not in set(trained)]


def credit(
    native: Sequence[float], target: Sequence[float], std: Sequence[float], trained: Sequence[int]
) -> Image.Image:
    """Native against target weight, their factor and the standard deviation per step, (T,) each.

    `trained` are the indices of trained steps; the others are grey, and their target is not drawn.
    """
    count = len(native)
    if not count or len(target) != count or len(std) != count:
        counts = f"{count}, {len(target)}, {len(std)} steps"
        raise ValueError(f"native, target, std have {counts}. Give one of each for every step, at least 1.")
    x, kept = list(range(count)), set(trained)
    aim = [float(v) if i in kept else math.nan for i, v in enumerate(target)]
    factor = [a / w if 0 < w < math.inf else math.nan for a, w in zip(aim, native, strict=True)]
    known = [w for w in native if 0 < w < math.inf]
    grey = _untrained(count, trained)
    axis = "denoising step, noise first"
    note = "grey: not trained" if grey else ""
    log = len(known) > 1 and max(known) > 20 * min(known)
    weights = [Line("native", x, native, style="points", color=1), Line("target", x, aim, style="points", color=0)]
    factors = [Line("", x, factor, style="points", color=2)]
    spread = [Line("", x, std, style="points", color=6)]
    return figure(
        [
            Panel("Weight of the log-ratio", axis, "weight", weights, log_y=log, shade=grey, note=note),
            Panel("Factor", axis, "target weight / native weight", factors, hlines=(1.0,), shade=grey),
            Panel("Noise of the step", axis, "standard deviation", spread, shade=grey),
        ],
        columns=3,
        size=(460, 340),
    )


# Pictures


def to_pil_images(images: np.ndarray | Tensor) -> list[Image.Image]:
    """uint8 or float in [0, 1], (B, H, W, 3) -> B pictures."""
    if isinstance(images, Tensor):
        images = (images.detach().float() if images.is_floating_point() else images.detach()).cpu().numpy()
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"images have shape {tuple(images.shape)}, but pictures are (B, H, W, 3), at least 1.")
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images are {images.dtype}, but pictures are uint8 or float in [0, 1]. Convert them.")
        images = np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in images]


def _tile_size(picture: Image.Image, tile: int) -> tuple[int, int]:
    ratio = tile / max(picture.size)
    return max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))


def _same_count(images: int, others: Mapping[str, Sequence[Any] | None]) -> None:
    for name, values in others.items():
        if values is not None and len(values) != images:
            raise ValueError(f"{len(values)} {name} for {images} images. Give one for each.")


def grid(
    images: np.ndarray | Tensor, captions: Sequence[str] | None = None, columns: int = 4, tile: int = 160
) -> Image.Image:
    """Pictures in rows, (B, H, W, 3), each over its caption of at most two rows."""
    pictures = to_pil_images(images)
    _same_count(len(pictures), {"captions": captions})
    width, height = _tile_size(pictures[0], tile)
    texts = [wrap(c, 11, width) for c in captions] if captions is not None else []
    foot = 10 + 15 * max((len(t) for t in texts), default=0) if any(captions or ()) else 0
    gap, columns = 12, max(1, min(columns, len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    canvas = Canvas(gap + columns * (width + gap), gap + rows * (height + foot + gap))
    for i, picture in enumerate(pictures):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + foot + gap)
        canvas.paste(picture, (left, top), (width, height), 6)
        for k, row in enumerate(texts[i] if texts else ()):
            canvas.text((left + width / 2, top + height + 13 + 15 * k), row, INK, 11, "mm")
    return canvas.finish()


def _score_text(value: float) -> str:
    return "no score" if not math.isfinite(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _draw_scores(canvas: Canvas, scores: tuple[float, float], left: float, width: float, y: float) -> None:
    """The two scores under their pictures; the second is green where it is higher."""
    before, after = scores
    old, text = _score_text(before), _score_text(after)
    color = MUTED if old == text else UP if after > before else DOWN if after < before else MUTED
    canvas.text((left + width / 2, y), old, MUTED, 12, "mm")
    half = text_width(text, 12) / 2 + 9
    middle = left + width * 1.5 + 4
    canvas.box((middle - half, y - 10, middle + half, y + 10), color + "1f", 10)
    canvas.text((middle, y), text, color, 12, "mm")


def before_after(
    before: np.ndarray | Tensor,
    after: np.ndarray | Tensor,
    prompts: Sequence[str],
    before_scores: Sequence[float] | None = None,
    after_scores: Sequence[float] | None = None,
    columns: int | None = None,
    tile: int = 160,
) -> Image.Image:
    """Pairs of pictures on cards with their prompt and scores, (B, H, W, 3) twice; 4 or 3 columns, without a hole."""
    first, second = to_pil_images(before), to_pil_images(after)
    others = {"after images": second, "prompts": prompts, "before_scores": before_scores, "after_scores": after_scores}
    _same_count(len(first), others)
    width, height = _tile_size(first[0], tile)
    texts = [wrap(p, 13, 2 * width + 4) for p in prompts]
    scored = before_scores is not None and after_scores is not None
    body = height + (32 if scored else 6)
    card = (2 * width + 4 + 20, 12 + 17 * max(len(t) for t in texts) + 8 + body + 6)
    gap, head = 14, 30
    columns = max(1, min(columns or min((4, 3), key=lambda n: -len(first) % n), len(first)))
    rows = math.ceil(len(first) / columns)
    canvas = Canvas(gap + columns * (card[0] + gap), head + 4 + rows * (card[1] + gap), "#eef1f4")
    for k in range(columns):
        left = gap + k * (card[0] + gap) + 10
        canvas.text((left + width / 2, head / 2 + 6), "before", MUTED, 13, "mm")
        canvas.text((left + width * 1.5 + 4, head / 2 + 6), "after", COLORS[0], 13, "mm")
    for i in range(len(first)):
        left, top = gap + i % columns * (card[0] + gap), head + 4 + i // columns * (card[1] + gap)
        canvas.box((left, top, left + card[0], top + card[1]), PAPER, 10)
        at = top + card[1] - body - 6
        for k, row in enumerate(texts[i]):
            middle = (top + at + 2) / 2 + 17 * (k - (len(texts[i]) - 1) / 2)
            canvas.text((left + card[0] / 2, middle), row, INK, 13, "mm")
        canvas.paste(first[i], (left + 10, at), (width, height), 5)
        canvas.paste(second[i], (left + 14 + width, at), (width, height), 5)
        if before_scores is not None and after_scores is not None:
            _draw_scores(canvas, (before_scores[i], after_scores[i]), left + 10, width, at + height + 18)
    return canvas.finish()
