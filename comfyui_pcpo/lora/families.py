"""Module names of each model family in LoRA files; the only place in this folder to edit for a new family.

A family needs an entry in LORA_FAMILIES for kohya's layout, which has the names of original checkpoints. Others are
`plain` if their modules have diffusers' names, and `core` if they have only ComfyUI's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from comfyui_pcpo.lora.unet_names import unet_names

Family = str
"""A key of LORA_FAMILIES."""


class OriginalPart(NamedTuple):
    """Original module and a part of it: 0, 1, 2 are q, k, v, 3 is what follows them, None is all of it."""

    module: str
    part: int | None = None


OriginalNames = dict[str, OriginalPart]


def same_names(modules: Sequence[str]) -> OriginalNames:
    """The names of a family whose checkpoints have those of diffusers."""
    return {module: OriginalPart(module) for module in modules}


@dataclass(frozen=True)
class LoraFamily:
    """OriginalNames of one family's modules, starting from those in diffusers."""

    mark: str  # regular expression: start of a module name that identifies the family
    original: Callable[[Sequence[str]], OriginalNames] | None = None  # names in original checkpoints, where known
    prefix: str = "transformer."  # of the keys in diffusers' layout
    underscored: bool = False  # ComfyUI and kohya's tools read diffusers' names with underscores
    diffusers: bool = True  # whether its modules have diffusers' names
    mlp_ratio: Mapping[str, int] = field(default_factory=dict)  # original module -> hidden sizes of its part 3


def attention(diffusers: str, original: str, added: bool = False) -> OriginalNames:
    """q, k, v, which are one module in original checkpoints, and the output projection."""
    names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out") if added else ("to_q", "to_k", "to_v", "to_out.0")
    *parts, out = (f"{diffusers}.{name}" for name in names)
    fused = {name: OriginalPart(f"{original}.qkv", part) for part, name in enumerate(parts)}
    return {**fused, out: OriginalPart(f"{original}.proj")}


def linears(names: Mapping[str, str]) -> OriginalNames:
    """The original names of modules that are not parts of a fused one."""
    return {module: OriginalPart(original) for module, original in names.items()}


Z_IMAGE: OriginalNames = {
    **{f"attention.to_{letter}": OriginalPart("attention.qkv", part) for part, letter in enumerate("qkv")},
    "attention.to_out.0": OriginalPart("attention.out"),
    **same_names([f"feed_forward.w{i}" for i in (1, 2, 3)]),
}
KREA2 = {
    r"^transformer_blocks\.": "blocks.",
    r"^text_fusion\.": "txtfusion.",
    r"\.attn\.to_gate$": ".attn.gate",
    r"\.attn\.to_out\.0$": ".attn.wo",
    r"\.attn\.to_": ".attn.w",
    r"\.ff\.": ".mlp.",
}
NO_MARK = r"(?!)"  # a mark that matches no name


def krea2_names(modules: Sequence[str]) -> OriginalNames:
    """Krea 2's names, which differ in some words of a module's path."""
    names = {}
    for module in modules:
        names[module] = module
        for diffusers, original in KREA2.items():
            names[module] = re.sub(diffusers, original, names[module])
    return linears(names)


def blocks(**tables: tuple[str, OriginalNames]) -> Callable[[Sequence[str]], OriginalNames]:
    """Renaming of `block.3.inner` to `original_block.3.original_inner` by {block: (original block, inner names)}."""

    def original(modules: Sequence[str]) -> OriginalNames:
        names: OriginalNames = {}
        for module in modules:
            block, number, inner = (*module.split(".", 2), "", "")[:3]
            name, table = tables.get(block, ("", {}))
            if inner in table:
                target = table[inner]
                names[module] = OriginalPart(f"{name}.{number}.{target.module}", target.part)
        return names

    return original


LORA_FAMILIES: dict[Family, LoraFamily] = {  # in the order in which `detect_family` tries the marks
    "unet": LoraFamily(
        mark=r"(down_blocks|up_blocks|mid_block)\.",
        original=lambda modules: linears(unet_names(modules)),
        prefix="unet.",
        underscored=True,
    ),
    "flux2": LoraFamily(
        mark=r".*\.(attn\.to_qkv_mlp_proj|(ff|ff_context)\.linear_(in|out))(\.|$)",
        original=blocks(
            transformer_blocks=(
                "double_blocks",
                {
                    **attention("attn", "img_attn"),
                    **attention("attn", "txt_attn", added=True),
                    **linears({
                        "ff.linear_in": "img_mlp.0",
                        "ff.linear_out": "img_mlp.2",
                        "ff_context.linear_in": "txt_mlp.0",
                        "ff_context.linear_out": "txt_mlp.2",
                    }),
                },
            ),
            single_transformer_blocks=(
                "single_blocks",
                linears({"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
            ),
        ),
    ),
    "flux": LoraFamily(
        mark=r"single_transformer_blocks\.",
        original=blocks(
            transformer_blocks=(
                "double_blocks",
                {
                    **attention("attn", "img_attn"),
                    **attention("attn", "txt_attn", added=True),
                    **linears({
                        "ff.net.0.proj": "img_mlp.0",
                        "ff.net.2": "img_mlp.2",
                        "ff_context.net.0.proj": "txt_mlp.0",
                        "ff_context.net.2": "txt_mlp.2",
                        "norm1.linear": "img_mod.lin",
                        "norm1_context.linear": "txt_mod.lin",
                    }),
                },
            ),
            single_transformer_blocks=(
                "single_blocks",
                {
                    **{f"attn.to_{letter}": OriginalPart("linear1", part) for part, letter in enumerate("qkv")},
                    "proj_mlp": OriginalPart("linear1", 3),
                    **linears({"proj_out": "linear2", "norm.linear": "modulation.lin"}),
                },
            ),
        ),
        mlp_ratio={"linear1": 4},
    ),
    "qwen": LoraFamily(mark=r"transformer_blocks\.\d+\.(img|txt)_mlp\.", original=same_names),
    "z_image": LoraFamily(
        mark=r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.to_",
        original=blocks(**{name: (name, Z_IMAGE) for name in ("layers", "noise_refiner", "context_refiner")}),
    ),
    "krea2": LoraFamily(mark=r".*\.(attn\.to_gate|ff\.(gate|up|down))(\.|$)", original=krea2_names),
    "hidream": LoraFamily(mark=r"(double|single)_stream_blocks\.", original=same_names),
    "ernie": LoraFamily(mark=r"layers\.\d+\.self_attention\.", original=same_names),
    "sd3": LoraFamily(
        mark=r"transformer_blocks\.\d+\.(attn2?|ff|ff_context|norm1|norm1_context)\.",
        original=blocks(
            transformer_blocks=(
                "joint_blocks",
                {
                    **attention("attn", "x_block.attn"),
                    **attention("attn2", "x_block.attn2"),
                    **attention("attn", "context_block.attn", added=True),
                    **linears({
                        "ff.net.0.proj": "x_block.mlp.fc1",
                        "ff.net.2": "x_block.mlp.fc2",
                        "ff_context.net.0.proj": "context_block.mlp.fc1",
                        "ff_context.net.2": "context_block.mlp.fc2",
                        "norm1.linear": "x_block.adaLN_modulation.1",
                        "norm1_context.linear": "context_block.adaLN_modulation.1",
                    }),
                },
            )
        ),
    ),
    "core": LoraFamily(mark=NO_MARK, original=same_names, prefix="diffusion_model.", diffusers=False),
    "plain": LoraFamily(mark=NO_MARK),
}  # fmt: skip

CROSS_ATTENTION = r"transformer_blocks\.\d+\.attn1\."
"""In transformers such as PixArt's, whose other modules are named as SD3's are."""


def detect_family(modules: Iterable[str]) -> Family:
    """The family of diffusers' module names: the first whose mark one of them has, otherwise `plain`."""
    names = list(modules)
    if any(re.match(CROSS_ATTENTION, module) for module in names):
        return "plain"
    for name, family in LORA_FAMILIES.items():
        if any(re.match(family.mark, module) for module in names):
            return name
    return "plain"


def original_names(modules: Iterable[str], family: Family) -> OriginalNames:
    """{diffusers module: its place in the original checkpoint}, for modules that have one."""
    original = LORA_FAMILIES[family].original
    return {} if original is None else original(list(modules))
