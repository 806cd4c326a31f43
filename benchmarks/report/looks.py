"""Colour and line of every method in the figures."""

from comfyui_pcpo.plotting.panels import LineStyle

from ..study.methods import CREDIT_METHODS

_CREDIT_COLORS = dict(zip(CREDIT_METHODS, (6, 0, 2, 1, 3), strict=True))
LOOKS: dict[str, tuple[int, LineStyle]] = {
    "ppo": (6, "line"),
    "ppo-early": (6, "dashed"),
    "ppo-branch-1": (2, "dashed"),
    "pcpo": (0, "line"),
    "pcpo-recommended": (3, "line"),
    "pcpo-branch-1": (2, "line"),
    "pcpo-branch-2": (5, "line"),
    "pcpo-branch-3": (5, "dashed"),
    "tempflow-grpo": (0, "dashed"),
    "grpo-guard": (3, "dashed"),
    "nft": (1, "line"),
    "nft-options": (1, "dashed"),
    "awm": (4, "line"),
    "awm-options": (4, "dashed"),
    **{name + end: (color, "line") for name, color in _CREDIT_COLORS.items() for end in ("", "-branch-1")},
}
GAIN_LABEL = "reward gain, base model's std"  # of an axis
