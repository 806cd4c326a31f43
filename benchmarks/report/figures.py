"""Figures of one task: convergence, health of the training, and image quality against the gain."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from comfyui_pcpo.plotting.panels import STEP_AXIS, Line, LineStyle, Panel, draw_panels
from comfyui_pcpo.plotting.run_curves import smooth

from ..study.methods import BASELINE, OURS, STUDY_METHODS
from ..study.statistics import Interval, t_interval
from .collect import CellRun, StepSummary, TaskResults, by_step, mean_where_finite

# one colour per objective and credit; PCPO's variants share its blue
LOOKS: dict[str, tuple[int, LineStyle]] = {
    "ppo": (6, "line"),
    "log-hinge": (1, "dashed"),  # often hidden behind native PPO otherwise
    "pcpo": (0, "line"),
    "pcpo-paper": (0, "dashed"),
    "pcpo-uniform": (0, "points"),
    "pcpo-branch-1": (5, "line"),
    "pcpo-branch-2": (5, "dashed"),
    "pcpo-branch-3": (5, "points"),
    "tempflow": (2, "line"),
    "guard-dt": (2, "dashed"),
    "tempflow-grpo": (2, "points"),
    "grpo-guard": (1, "points"),
    "awm": (3, "line"),
    "awm-options": (3, "dashed"),
    "nft": (4, "line"),
    "nft-options": (4, "dashed"),
    "window": (6, "dashed"),
    "pcpo-window": (5, "dashed"),
    "cps": (6, "points"),
    "pcpo-cps": (5, "points"),
}
UNITS = "std of the base model's rewards"
TASK_PANEL_SIZE = (520, 380)

Series = Callable[[CellRun], Sequence[float]]


def method_line(name: str, x: Sequence[float], y: Sequence[float]) -> Line:
    color, style = LOOKS[name]
    return Line(STUDY_METHODS[name].title, x, y, style=style, color=color)


def interval_line(name: str, x: Sequence[float], intervals: Sequence[Interval]) -> Line:
    """The method's curve; with its band for PCPO and its baseline, whose comparison the figure is about."""
    middle = method_line(name, x, [i.value for i in intervals])
    if name not in (BASELINE, OURS):
        return middle
    return replace(middle, low=[i.low for i in intervals], high=[i.high for i in intervals])


def _mean_curve(runs: Sequence[CellRun], of: Series) -> list[float]:
    return np.array([of(run) for run in runs], float).mean(0).tolist()


def _mean_lines(results: TaskResults, of: Series, x: Series) -> list[Line]:
    """One line per method: the mean over seeds."""
    return [method_line(name, x(runs[0]), _mean_curve(runs, of)) for name, runs in results.runs.items()]


def convergence_figure(results: TaskResults) -> Image.Image:
    """Gain by update, kept gain, and its difference from native PPO paired by seed."""
    kept, differences = [], []
    baseline = {run.seed: run.kept for run in results.runs[BASELINE]}
    for name, runs in results.runs.items():
        x = runs[0].updates
        kept.append(interval_line(name, x, [t_interval(c) for c in np.array([run.kept for run in runs]).T]))
        paired = [np.subtract(run.kept, baseline[run.seed]) for run in runs if run.seed in baseline]
        if name != BASELINE and paired:
            differences.append(interval_line(name, x, [t_interval(c) for c in np.array(paired).T]))
    gains = _mean_lines(results, lambda run: run.gains, lambda run: run.updates)
    counts = sorted({len(runs) for runs in results.runs.values()})
    seeds = f"{'-'.join(map(str, (counts[0], counts[-1])[: len(counts)]))} seeds"
    return draw_panels(
        [
            Panel("Gain, all images", "update", UNITS, gains, note=f"{seeds}, means"),
            Panel("Kept gain", "update", UNITS, kept, note="95 % bands"),
            Panel("Kept gain over native PPO", "update", UNITS, differences, hlines=(0.0,), note="paired by seed"),
        ],
        columns=3,
        size=TASK_PANEL_SIZE,
    )


def _variation(table: np.ndarray) -> np.ndarray:
    """Coefficient of variation of each step's gradient norm over the last three quarters of the updates."""
    late = table[len(table) // 4 :]
    mean = mean_where_finite(late)
    spread = np.sqrt(mean_where_finite((late - mean) ** 2)) / mean
    return np.where(np.isfinite(late).sum(0) > 1, spread, np.nan)  # undefined for a single update


def _step_lines(results: TaskResults, key: str, of: StepSummary = mean_where_finite) -> list[Line]:
    by_method = {name: by_step(runs, key, of) for name, runs in results.runs.items()}
    return [method_line(name, [float(i) for i in x], y.tolist()) for name, (x, y) in by_method.items()]


def health_figure(results: TaskResults) -> Image.Image:
    """Clip fraction, gradient norm and Taylor error: over training and per step."""

    def over_training(key: str) -> list[Line]:
        return _mean_lines(
            results, lambda run: smooth(run.over_updates(key), 0.6), lambda run: run.over_updates("update")
        )

    def steps(key: str, of: StepSummary = mean_where_finite) -> list[Line]:
        return _step_lines(results, key, of)

    panels = [
        Panel("Clip fraction", "update", "share of clipped terms", over_training("clip_fraction")),
        Panel("Clip fraction per step", STEP_AXIS, "share of clipped terms", steps("clip_fraction")),
        Panel("Taylor error per step", STEP_AXIS, "|log rho - (rho - 1)|", steps("taylor_error"), log_y=True),
        Panel("Gradient norm", "update", "norm", over_training("grad_norm"), log_y=True),
        Panel("Gradient norm per step", STEP_AXIS, "norm of the step's share", steps("grad_norm"), log_y=True),
        Panel("Variation of the gradient norm", STEP_AXIS, "std / mean over updates", steps("grad_norm", _variation)),
    ]
    return draw_panels(panels, columns=3, size=TASK_PANEL_SIZE)


def matched_figure(results: TaskResults) -> Image.Image:
    """Distances, diversity and correct objects against the gain, means over seeds."""
    quantities = (
        ("fd_base", "Distance to the base model", "tiny FD"),
        ("fd_drawn", "Distance to drawings", "tiny FD"),
        ("diversity", "Diversity", "1 - cosine within a prompt"),
        ("object", "Correct object", "share of images"),
    )
    panels = []
    for key, title, label in quantities:
        lines = [
            method_line(
                name, _mean_curve(runs, lambda r: r.gains), _mean_curve(runs, lambda r, key=key: r.evaluated(key))
            )
            for name, runs in results.runs.items()
        ]
        panels.append(Panel(title, f"gain, {UNITS}", label, lines))
    return draw_panels(panels, columns=2, size=(560, 380))


TASK_FIGURES: dict[str, Callable[[TaskResults], Image.Image]] = {
    "convergence": convergence_figure,
    "health": health_figure,
    "matched": matched_figure,
}
