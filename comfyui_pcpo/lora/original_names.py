"""Names of the original checkpoints for diffusers' modules, which kohya's LoRA files use; q, k and v are one there.

unet   down_blocks.1.attentions.0.X           -> input_blocks.4.1.X (two resnets per level)
sd3    transformer_blocks.3.attn.to_k         -> joint_blocks.3.x_block.attn.qkv, part 1
flux   single_transformer_blocks.3.proj_mlp   -> single_blocks.3.linear1, part 3
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Family = Literal["unet", "sd3", "flux", "plain"]
Place = tuple[str, int | None]
"""Original module and which of its parts: 0, 1, 2 are q, k, v, 3 is what follows them, None is all of it."""

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _qkv(attention: str, fused: str, out: str, added: bool = False) -> dict[str, Place]:
    names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out") if added else ("to_q", "to_k", "to_v", "to_out.0")
    places: tuple[Place, ...] = ((fused, 0), (fused, 1), (fused, 2), (out, None))
    return {f"{attention}.{name}": place for name, place in zip(names, places, strict=True)}


_SD3: dict[str, Place] = {
    **_qkv("attn", "x_block.attn.qkv", "x_block.attn.proj"),
    **_qkv("attn2", "x_block.attn2.qkv", "x_block.attn2.proj"),
    **_qkv("attn", "context_block.attn.qkv", "context_block.attn.proj", added=True),
    "ff.net.0.proj": ("x_block.mlp.fc1", None),
    "ff.net.2": ("x_block.mlp.fc2", None),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", None),
    "ff_context.net.2": ("context_block.mlp.fc2", None),
    "norm1.linear": ("x_block.adaLN_modulation.1", None),
    "norm1_context.linear": ("context_block.adaLN_modulation.1", None),
}
_DOUBLE: dict[str, Place] = {
    **_qkv("attn", "img_attn.qkv", "img_attn.proj"),
    **_qkv("attn", "txt_attn.qkv", "txt_attn.proj", added=True),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
}
_SINGLE: dict[str, Place] = {
    **{f"attn.to_{letter}": ("linear1", part) for part, letter in enumerate("qkv")},
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
    "norm.linear": ("modulation.lin", None),
}
_BLOCKS: dict[str, dict[str, tuple[str, dict[str, Place]]]] = {
    "sd3": {"transformer_blocks": ("joint_blocks", _SD3)},
    "flux": {
        "transformer_blocks": ("double_blocks", _DOUBLE),
        "single_transformer_blocks": ("single_blocks", _SINGLE),
    },
}


def family_of(modules: Iterable[str]) -> Family:
    """The family of diffusers' module names. `plain` keeps those names everywhere; without a sign of it, sd3."""
    names = list(modules)
    if any(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in names):
        return "unet"
    if any(name.startswith("single_transformer_blocks.") for name in names):
        return "flux"
    return "plain" if any(".img_mlp." in name for name in names) else "sd3"


def original_names(modules: Iterable[str], family: Family) -> dict[str, Place]:
    """{diffusers module: its place in the original checkpoint}, for those that have one."""
    names = list(modules)
    if family == "unet":
        per_level = 1 + max(
            (int(n.split(".")[3]) for n in names if re.match(r"down_blocks\.0\.resnets\.", n)), default=1
        )
        attended = {n.split(".")[1] for n in names if re.match(r"up_blocks\.\d+\.attentions\.", n)}
        found = {name: _unet_place(name, per_level, attended) for name in names}
    else:
        found = {name: _transformer_place(name, family) for name in names}
    return {name: place for name, place in found.items() if place is not None}


def _transformer_place(name: str, family: str) -> Place | None:
    block, number, inner = (*name.split(".", 2), "", "")[:3]
    if family == "plain":
        return name, None
    if block not in _BLOCKS[family]:
        return None
    original, table = _BLOCKS[family][block]
    place = table.get(inner)
    return place and (f"{original}.{number}.{place[0]}", place[1])


def _unet_place(name: str, per_level: int, attended: set[str]) -> Place | None:
    """`per_level` resnets lead down a level and one more leads up it; `attended` are the levels up with attention."""
    parts = name.split(".")
    if parts[0] == "mid_block":
        kind, number, inner = parts[1], int(parts[2]), ".".join(parts[3:])
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{_RESNET.get(inner, inner)}", None
    if parts[0] not in ("down_blocks", "up_blocks"):
        return None
    up, level, kind, number, inner = (
        parts[0] == "up_blocks",
        int(parts[1]),
        parts[2],
        int(parts[3]),
        ".".join(parts[4:]),
    )
    side, size, first = ("output_blocks", per_level + 1, 0) if up else ("input_blocks", per_level + 1, 1)
    if kind == "downsamplers":
        return f"{side}.{(level + 1) * size}.0.op", None
    if kind == "upsamplers":
        return f"{side}.{(level + 1) * size - 1}.{2 if parts[1] in attended else 1}.conv", None
    block = first + level * size + number
    return f"{side}.{block}.{1 if kind == 'attentions' else 0}.{_RESNET.get(inner, inner)}", None
