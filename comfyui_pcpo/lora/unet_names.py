"""Original names of a diffusers UNet's modules.

down_blocks.1.attentions.0.X   -> input_blocks.4.1.X (two resnets per level)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def unet_names(modules: Sequence[str]) -> dict[str, str]:
    """{diffusers module: original module}; the number of resnets per level is read from the names."""
    first_level = (re.match(r"down_blocks\.0\.resnets\.(\d+)", name) for name in modules)
    per_level = 1 + max((int(match[1]) for match in first_level if match), default=1)
    attended = {name.split(".")[1] for name in modules if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    names = {module: _original_name(module, per_level, attended) for module in modules}
    return {module: name for module, name in names.items() if name is not None}


def _original_name(module: str, per_level: int, attended: set[str]) -> str | None:
    """Original name; each level has `per_level` resnets on the way down and one more on the way up.

    `attended` are the up levels with attention.
    """
    parts = module.split(".")
    if parts[0] == "mid_block":
        kind, number, inner = parts[1], int(parts[2]), ".".join(parts[3:])
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{_RESNET.get(inner, inner)}"
    if parts[0] not in ("down_blocks", "up_blocks"):
        return None
    level, kind, number, inner = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    side, first = ("output_blocks", 0) if parts[0] == "up_blocks" else ("input_blocks", 1)
    size = per_level + 1
    if kind == "downsamplers":
        return f"{side}.{(level + 1) * size}.0.op"
    if kind == "upsamplers":
        return f"{side}.{(level + 1) * size - 1}.{2 if parts[1] in attended else 1}.conv"
    block = first + level * size + number
    return f"{side}.{block}.{1 if kind == 'attentions' else 0}.{_RESNET.get(inner, inner)}"
