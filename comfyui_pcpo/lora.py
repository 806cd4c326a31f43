"""LoRA names and alpha folding: one adapter, the key layouts that ComfyUI, diffusers and kohya's tools read.

A pair is (A, B): A (r, in) or (r, in, k, k) comes first, B (out, r) or (out, r, 1, 1) second;
the update is alpha / r B A.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["comfyui", "diffusers", "kohya"]
Family = Literal["unet", "sd3", "flux"]
Pair = tuple[Tensor, Tensor]

_DOTTED = ("transformer.", "unet.")
_UNDERSCORED = ("lora_transformer_", "lora_unet_")
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}


def family_of(modules: Iterable[str]) -> Family:
    """unet, sd3 or flux, told from the diffusers names of modules; any transformer that is not FLUX is sd3."""
    names = list(modules)
    if any(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in names):
        return "unet"
    return "flux" if any(name.startswith("single_transformer_blocks.") for name in names) else "sd3"


def kohya_unet_name(module: str) -> str:
    """kohya's name of a UNet module: `a.b.0.to_q` -> `lora_unet_a_b_0_to_q`."""
    return "lora_unet_" + module.replace(".", "_")


def kohya_transformer_name(module: str) -> str:
    """The underscored name of an SD3 or FLUX module in diffusers' naming: `a.b` -> `lora_transformer_a_b`.

    OneTrainer's names, which ComfyUI reads. kohya's own lora_unet_ names for these families are those of the original
    checkpoints, with q, k and v fused, so a diffusers module has none.
    """
    return "lora_transformer_" + module.replace(".", "_")


def export_state(
    pairs: Mapping[str, Pair], alpha: float, rank: int, layout: Layout, family: Family
) -> dict[str, Tensor]:
    """The file's tensors by key.

    unet, comfyui and kohya    lora_unet_<underscored>.lora_down.weight, .lora_up.weight, .alpha
    sd3 and flux, kohya        lora_transformer_<underscored>, same suffixes
    everything else            unet.<name> or transformer.<name> + .lora_A.weight, .lora_B.weight; alpha / rank is in B
    """
    if layout not in ("comfyui", "diffusers", "kohya"):
        raise ValueError(f"layout is {layout!r}, but it must be 'comfyui', 'diffusers' or 'kohya'.")
    if family not in ("unet", "sd3", "flux"):
        raise ValueError(f"family is {family!r}, but it must be 'unet', 'sd3' or 'flux'.")
    if not pairs:
        raise ValueError("there are 0 LoRA modules, but a file needs at least one. Check the target modules.")
    for module, pair in pairs.items():
        _check_pair(module, pair, rank)
    underscored = layout == "kohya" or (layout == "comfyui" and family == "unet")
    return _kohya(pairs, alpha, family) if underscored else _peft(pairs, alpha / rank, family)


def parse_state(state: Mapping[str, Tensor], module_names: Iterable[str] | None = None) -> dict[str, Pair]:
    """Read any of the layouts back as {diffusers module: (A, B)}, alpha / rank in B.

    Underscored keys do not say where the dots were: they need the model's `module_names`.
    """
    dotted = _underscore_index(module_names or ())
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, part = _split_key(key, dotted)
        parts.setdefault(module, {})[part] = tensor
    return {module: _join(module, found) for module, found in parts.items()}


def _kohya(pairs: Mapping[str, Pair], alpha: float, family: Family) -> dict[str, Tensor]:
    name = kohya_unet_name if family == "unet" else kohya_transformer_name
    _underscore_index(pairs)
    state = {}
    for module, (a, b) in pairs.items():
        state[f"{name(module)}.lora_down.weight"] = a.detach().contiguous()
        state[f"{name(module)}.lora_up.weight"] = b.detach().contiguous()
        state[f"{name(module)}.alpha"] = torch.tensor(float(alpha))
    return state


def _peft(pairs: Mapping[str, Pair], scale: float, family: Family) -> dict[str, Tensor]:
    prefix = "unet." if family == "unet" else "transformer."
    state = {}
    for module, (a, b) in pairs.items():
        state[f"{prefix}{module}.lora_A.weight"] = a.detach().contiguous()
        state[f"{prefix}{module}.lora_B.weight"] = _fold(b.detach(), scale)
    return state


def _fold(b: Tensor, scale: float) -> Tensor:
    """B times alpha / rank, multiplied in float32 or wider and returned in B's dtype."""
    wider = b.to(torch.promote_types(b.dtype, torch.float32))
    return (wider * scale).to(b.dtype).contiguous() if scale != 1 else b.contiguous()


def _check_pair(module: str, pair: Pair, rank: int) -> None:
    a, b = pair
    if a.ndim not in (2, 4) or a.ndim != b.ndim or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{module} has A {tuple(a.shape)} and B {tuple(b.shape)}, but they must be (r, in) and (out, r), "
            "or (r, in, k, k) and (out, r, 1, 1). Check the adapter."
        )
    if a.shape[0] != rank:
        raise ValueError(f"{module} has rank {a.shape[0]}, but rank is {rank}. Export modules of one rank with it.")


def _underscore_index(names: Iterable[str]) -> dict[str, str]:
    """{underscored: dotted}; refuses two modules that the underscores make one."""
    index: dict[str, str] = {}
    for name in names:
        flat = name.replace(".", "_")
        if index.setdefault(flat, name) != name:
            raise ValueError(
                f"modules {index[flat]} and {name} are both {flat} when underscored. "
                "Use the 'diffusers' layout for this model."
            )
    return index


def _split_key(key: str, dotted: Mapping[str, str]) -> tuple[str, str]:
    """(diffusers module, "A", "B" or "alpha") of a key."""
    suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
    if suffix:
        name = key[: -len(suffix)]
        for prefix in _DOTTED:
            if name.startswith(prefix):
                return name[len(prefix) :], _SUFFIXES[suffix]
        for prefix in _UNDERSCORED:
            if name.startswith(prefix):
                return _restore_dots(name[len(prefix) :], key, dotted), _SUFFIXES[suffix]
    raise ValueError(
        f"key {key} is not a LoRA weight of the denoiser. Keys start with {', '.join(_DOTTED + _UNDERSCORED)} "
        f"and end with {', '.join(_SUFFIXES)}. Re-export the file in one of these layouts."
    )


def _restore_dots(flat: str, key: str, dotted: Mapping[str, str]) -> str:
    if flat not in dotted:
        raise ValueError(
            f"key {key} matches none of the {len(dotted)} module names given, and underscores hide its dots. "
            "Pass module_names of the model that the file was trained on."
        )
    return dotted[flat]


def _join(module: str, found: Mapping[str, Tensor]) -> Pair:
    """(A, B) of a module with alpha / rank in B; no alpha means alpha = rank."""
    missing = [part for part in ("A", "B") if part not in found]
    if missing:
        raise ValueError(f"{module} lacks its LoRA {missing[0]}, but A and B come in pairs. The file is incomplete.")
    a, b = found["A"], found["B"]
    _check_pair(module, (a, b), len(a))
    scale = found["alpha"].item() / len(a) if "alpha" in found else 1.0
    return a, _fold(b, scale)
