"""Credit of a schedule: native against target weight per step."""

import math
from collections.abc import Sequence

from PIL import Image

from comfyui_pcpo.plotting.panels import STEP_AXIS, Line, Panel, draw_panels

CREDIT_PANEL_SIZE = (460, 340)  # of a panel
LOG_FROM = 20  # ratio of the largest to the smallest weight from which their axis is logarithmic


def credit_panels(
    native: Sequence[float], target: Sequence[float], std: Sequence[float], trained: Sequence[int]
) -> list[Panel]:
    """Native and target weight, their factor, and the noise's standard deviation per step, (T,) each.

    `trained` are the indices of trained steps; the others are grey, and their target is not drawn.
    """
    count = len(native)
    if not count or len(target) != count or len(std) != count:
        counts = f"{count}, {len(target)}, {len(std)} steps"
        raise ValueError(f"native, target, std have {counts}. Give one of each for every step, at least 1.")
    x, kept = list(range(count)), set(trained)
    aim = [float(v) if i in kept else math.nan for i, v in enumerate(target)]
    factor = [a / w if 0 < w < math.inf else math.nan for a, w in zip(aim, native, strict=True)]
    positive = [w for w in native if 0 < w < math.inf]
    log = len(positive) > 1 and max(positive) > LOG_FROM * min(positive)
    grey = [(i - 0.5, i + 0.5) for i in x if i not in kept]
    note = "grey: not trained" if grey else ""
    weights = [Line("native", x, native, style="points", color=1), Line("target", x, aim, style="points", color=0)]
    factors, spread = (Line("", x, y, style="points", color=k) for y, k in ((factor, 2), (std, 6)))
    return [
        Panel("Weight of the log-ratio", STEP_AXIS, "weight", weights, log_y=log, shade=grey, note=note),
        Panel("Factor", STEP_AXIS, "target weight / native weight", [factors], hlines=(1.0,), shade=grey),
        Panel("Noise of the step", STEP_AXIS, "standard deviation", [spread], shade=grey),
    ]


def credit_weights(
    native: Sequence[float], target: Sequence[float], std: Sequence[float], trained: Sequence[int]
) -> Image.Image:
    """The credit panels side by side."""
    return draw_panels(credit_panels(native, target, std, trained), columns=3, size=CREDIT_PANEL_SIZE)
