"""What `auto` stands for, per family of models: steps, guidance, sampler, learning rate, LoRA, resolution.

Values are those of published recipes, which the comments name. Where there is none for a family, they are those of the
nearest family that has one, with the guidance of the model's own pipeline. A value that is given always wins.

Sources: DDPO (kvablack/ddpo-pytorch, config/base.py), Flow-GRPO (yifan123/flow_grpo, config/grpo.py), Flow-Factory
(X-GenGroup/Flow-Factory, examples/). All train at a lower resolution and with fewer steps than one samples with.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from comfyui_pcpo.method.forward_process import ALL_OBJECTIVES

AUTO = "auto"


@dataclass(frozen=True)
class Preset:
    """The values of one family; `side` is the height and width of training images in pixels."""

    steps: int = 10
    cfg: float = 1.0
    guidance: float = 3.5  # input of models with distilled guidance
    noise_level: float | None = None  # None: the method's published value
    sde_window: int = 0
    branch: int = 0
    learning_rate: float = 3e-4
    clip_range: float = 1e-4
    rank: int = 32
    targets: str = "attention"
    side: int | None = 512
    gib_per_image: float = 1.0  # activations of one trained image at `side`, checkpointed, in bfloat16
    own_side: int = 1024  # height and width in pixels without rollout.height and width


PRESETS: dict[str, Preset] = {
    # the embedded models: what worked in the demo; branch: docs/results.md
    "embedded": Preset(
        branch=1, clip_range=1e-3, rank=8, targets="linear", learning_rate=3e-3, side=None, gib_per_image=0.01
    ),
    # DDPO: 50 steps, guidance 5, eta 1, LoRA of rank 4 at 3e-4, clip range 1e-4
    "sd15": Preset(steps=50, cfg=5.0, rank=4, gib_per_image=0.5, own_side=512),
    # DDPO, with the size of SD2.1's base model
    "sd2": Preset(steps=50, cfg=5.0, rank=16, gib_per_image=0.5, own_side=768),
    # DDPO's sampler and optimizer, SDXL's size; at 512 pixels SDXL's images fall apart
    "sdxl": Preset(steps=30, cfg=5.0, rank=16, side=1024, gib_per_image=1.2),
    # Turbo, Lightning, LCM, Hyper: the steps and guidance that they were distilled for; no published recipe
    "sdxl-distilled": Preset(steps=4, cfg=1.0, rank=16, side=512, gib_per_image=0.3),
    # Flow-GRPO general_ocr_sd3: 10 steps (40 to sample), guidance 4.5, noise 0.7, rank 32 at 3e-4, 512 pixels
    "sd3": Preset(cfg=4.5, noise_level=0.7, gib_per_image=0.4),
    # SD3.5 Large Turbo: 4 steps without guidance; else as FLUX.2 klein, the nearest with a recipe
    "sd3-distilled": Preset(steps=4, noise_level=0.5, sde_window=1),
    # Flow-GRPO pickscore_flux: 6 steps (28 to sample), guidance 3.5, noise 0.9, 512 pixels
    "flux": Preset(steps=6, noise_level=0.9, gib_per_image=0.8),
    # schnell: 4 steps; else as FLUX.2 klein
    "flux-distilled": Preset(steps=4, noise_level=0.5, sde_window=1, gib_per_image=0.8),
    # Flow-GRPO's settings for SD3.5, the guidance of ChromaPipeline
    "chroma": Preset(cfg=5.0, noise_level=0.7, gib_per_image=0.8),
    # Flow-Factory grpo/lora/flux2/t2i: 8 steps, guidance 4, noise 1.0 in one step, rank 64, 512 pixels
    "flux2": Preset(steps=8, guidance=4.0, noise_level=1.0, sde_window=1, rank=64, gib_per_image=2.0),
    # Flow-Factory grpo/lora/flux2_klein: 4 steps without guidance, noise 0.5 in one step, rank 64, 384 pixels
    "flux2-klein": Preset(steps=4, noise_level=0.5, sde_window=1, rank=64, side=384),
    # Flow-Factory grpo/lora/flux2_klein_base: 8 steps, guidance 4, noise 0.7 in one step, rank 64, 384 pixels
    "flux2-klein-base": Preset(steps=8, cfg=4.0, noise_level=0.7, sde_window=1, rank=64, side=384),
    # Flow-GRPO's settings for SD3.5, the guidance of QwenImagePipeline
    "qwen-image": Preset(cfg=4.0, noise_level=0.7, gib_per_image=1.5),
    # Flow-Factory grpo/lora/qwen_image_2_1: 10 steps without guidance, noise 1.0 in one step, rank 64, 384 pixels
    "qwen-image-2.1": Preset(noise_level=1.0, sde_window=1, rank=64, side=384, gib_per_image=1.5),
    # Flow-Factory grpo/lora/z_image: 10 steps, noise 0.7 in one step, rank 64; its guidance 4, added to the conditional
    # branch as in ZImagePipeline, is cfg 5
    "z-image": Preset(cfg=5.0, noise_level=0.7, sde_window=1, rank=64),
    # Flow-Factory grpo/lora/z_image_turbo: 6 steps without guidance, noise 0.7 in one step, rank 64
    "z-image-distilled": Preset(steps=6, noise_level=0.7, sde_window=1, rank=64),
    # Flow-GRPO's settings for SD3.5 and the guidance of the model's pipeline, from here on; Krea 2's 4.5 is cfg 5.5
    "lumina2": Preset(cfg=4.0, noise_level=0.7),
    "hidream": Preset(cfg=5.0, noise_level=0.7, gib_per_image=1.5),
    "hidream-distilled": Preset(steps=8, noise_level=0.7, sde_window=1, gib_per_image=1.5),  # dev, fast
    "krea2": Preset(cfg=5.5, noise_level=0.7, gib_per_image=1.5),
    "krea2-distilled": Preset(steps=6, noise_level=0.7, sde_window=1, gib_per_image=1.5),
    "ernie-image": Preset(cfg=4.0, noise_level=0.7),
    "ideogram4": Preset(cfg=4.0, noise_level=0.7, gib_per_image=1.5),
    "anima": Preset(cfg=4.0, noise_level=0.7),
    "cosmos": Preset(cfg=7.0, noise_level=0.7),
    "wan": Preset(cfg=5.0, noise_level=0.7, side=480),
    # a model without an entry
    "epsilon": Preset(steps=30, cfg=5.0, rank=16),
    "flow": Preset(cfg=4.0, noise_level=0.7),
    "flow-distilled": Preset(steps=6, noise_level=0.7, sde_window=1),
}

PRESET_OPTIONS: dict[tuple[str, str], str] = {
    ("rollout", "steps"): "steps",
    ("rollout", "cfg"): "cfg",
    ("rollout", "guidance"): "guidance",
    ("rollout", "noise_level"): "noise_level",
    ("rollout", "sde_window"): "sde_window",
    ("rollout", "branch"): "branch",
    ("rollout", "height"): "side",
    ("rollout", "width"): "side",
    ("objective", "clip_range"): "clip_range",
    ("lora", "rank"): "rank",
    ("lora", "targets"): "targets",
    ("optimizer", "learning_rate"): "learning_rate",
}
"""Which option takes which value of a preset. rollout.method has an `auto` of its own, by the kind of model."""

DISTILLED = re.compile(
    r"turbo|lightning|schnell|(?<![a-z])(hyper|lcm|dmd|klein|fast|few-step|(?<!de-)(?<!un-)distill(ed)?)(?![a-z])"
)
"""Words in the name of a model that samples in a few steps, for which guidance is built in; the later ones only as
whole words, since other models are called hyperrealism, breakfast, or de-distilled."""


def preset_name(family: str, name: str) -> str:
    """The preset of a family's model by its file or hub name: distilled models have presets of their own."""
    words = _words(name)
    if family == "flux2" and "klein" in words:
        return "flux2-klein-base" if "base" in words else "flux2-klein"
    distilled = DISTILLED.search(words) is not None or (family == "hidream" and "dev" in words)
    return f"{family}-distilled" if distilled and f"{family}-distilled" in PRESETS else family


def timestep_spacing(name: str) -> Literal["leading", "trailing"]:
    """How ddim steps are spaced where only the name of a model's file tells: few-step models begin at pure noise."""
    return "trailing" if DISTILLED.search(_words(name)) else "leading"


def _words(name: str) -> str:
    """A name in lower case, with hyphens between its words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().replace("_", "-")


def has_auto(tree: Mapping[str, Any]) -> bool:
    """Whether an option that presets know is `auto`."""
    return needs_room(tree) or any(_given(tree, section, key) == AUTO for section, key in PRESET_OPTIONS)


def needs_room(tree: Mapping[str, Any]) -> bool:
    """Whether an option whose `auto` depends on the device's memory is `auto`."""
    memory = (("rollout", "images_at_once"), ("model", "gradient_checkpointing"))
    return any(_given(tree, section, key) == AUTO for section, key in memory)


@dataclass(frozen=True)
class Room:
    """Bytes that the device has for activations, and whether it is a GPU."""

    free: float
    gpu: bool


UNLIMITED = Room(math.inf, gpu=False)


def resolved(tree: Mapping[str, Any], name: str, room: Room) -> tuple[dict[str, Any], dict[str, Any]]:
    """`tree` with the values of the preset `name` in place of every `auto`, and those values by option."""
    preset, chosen = PRESETS[name], dict[str, Any]()
    for (section, key), field in PRESET_OPTIONS.items():
        if _given(tree, section, key) == AUTO:
            chosen[f"{section}.{key}"] = getattr(preset, field)
    chosen |= dict.fromkeys(_not_for(tree) & chosen.keys())
    chosen |= _memory(tree, preset, room)
    filled = {section: dict(values) if isinstance(values, Mapping) else values for section, values in tree.items()}
    for option, value in chosen.items():
        section, key = option.split(".")
        filled[section].pop(key)
        if value is not None:
            filled[section][key] = value
    return filled, {option: value for option, value in chosen.items() if value is not None}


def _not_for(tree: Mapping[str, Any]) -> set[str]:
    """Options that keep their default: objectives on the forward process sample without noise; branch, window and share
    of the steps exclude each other, and a given one wins; a model in shards has no branch."""
    objective = ALL_OBJECTIVES.get(str(_given(tree, "objective", "name")))
    if objective is not None and not objective.replays_steps:
        return {"rollout.noise_level", "rollout.sde_window", "rollout.branch"}
    window, branch = _given(tree, "rollout", "sde_window"), _given(tree, "rollout", "branch")
    share = _given(tree, "objective", "train_steps")
    idle = set[str]()
    if branch not in (None, 0, AUTO):
        idle.add("rollout.sde_window")
    sharded = _given(tree, "model", "shard") is True
    if sharded or window not in (None, 0, AUTO) or (isinstance(share, int | float) and share < 1):
        idle.add("rollout.branch")
    return idle


def _memory(tree: Mapping[str, Any], preset: Preset, room: Room) -> dict[str, Any]:
    """Images per model call and gradient checkpointing, so that the activations fit."""
    checkpointing, chosen = _given(tree, "model", "gradient_checkpointing"), {}
    cfg = _given(tree, "rollout", "cfg")
    guided = 1 if (preset.cfg if cfg == AUTO else cfg or 1) == 1 else 2
    image = preset.gib_per_image * 2**30 * _area(tree, preset) * guided
    if checkpointing == AUTO:
        checkpointing = room.gpu and room.free < 16 * UNCHECKPOINTED * image
        chosen["model.gradient_checkpointing"] = checkpointing
    if _given(tree, "rollout", "images_at_once") == AUTO:
        most = room.free / (image * (1 if checkpointing else UNCHECKPOINTED))
        chosen["rollout.images_at_once"] = int(max(1, min(16, most)))
    return chosen


def _area(tree: Mapping[str, Any], preset: Preset) -> float:
    """Pixels of an image in units of the preset's."""
    if preset.side is None:
        return 1.0
    sides = [_given(tree, "rollout", key) or preset.own_side for key in ("height", "width")]
    return math.prod(side if isinstance(side, int) else preset.side for side in sides) / preset.side**2  # or `auto`


def _given(tree: Mapping[str, Any], section: str, key: str) -> Any:
    values = tree.get(section)
    return values.get(key) if isinstance(values, Mapping) else None


UNCHECKPOINTED = 8
"""About how many times the activations take without gradient checkpointing (docs/performance.md)."""


def described(name: str, chosen: Mapping[str, Any]) -> str:
    """One line: `auto for sdxl: rollout.steps 30, rollout.cfg 5, ...`."""
    values = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in chosen.items())
    return f"auto for {name}: {values}"
