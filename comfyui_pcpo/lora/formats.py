"""LoRA names and alpha folding: one adapter, the key layouts that ComfyUI, diffusers and kohya's tools read.

A pair is (A, B): A (r, in) or (r, in, k, k) comes first, B (out, r) or (out, r, 1, 1) second;
the update is alpha / r B A.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from comfyui_pcpo.lora.original_names import Family, Place, family_of, original_names

Layout = Literal["comfyui", "diffusers", "kohya"]
Pair = tuple[Tensor, Tensor]

_DOTTED = ("transformer.", "unet.", "diffusion_model.", "base_model.model.")
_UNDERSCORED = ("lora_transformer_", "lora_unet_")
_TEXT = ("lora_te", "text_encoder", "clip_", "t5xxl")
_MLP_RATIO = 4  # of FLUX's single blocks, whose first layer holds q, k, v and the feed-forward part
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}


def kohya_unet_name(module: str) -> str:
    """kohya's name of a UNet module: `a.b.0.to_q` -> `lora_unet_a_b_0_to_q`."""
    return "lora_unet_" + module.replace(".", "_")


def export_state(
    pairs: Mapping[str, Pair], alpha: float, rank: int, layout: Layout, family: Family
) -> dict[str, Tensor]:
    """The file's tensors by key.

    unet, comfyui and kohya    lora_unet_<underscored>.lora_down.weight, .lora_up.weight, .alpha
    kohya of the others        the same with the original checkpoint's names, q, k and v as one module
    everything else            unet.<name> or transformer.<name> + .lora_A.weight, .lora_B.weight; alpha / rank is in B
    """
    if layout not in ("comfyui", "diffusers", "kohya"):
        raise ValueError(f"layout is {layout!r}, but it must be 'comfyui', 'diffusers' or 'kohya'.")
    if family not in get_args(Family):
        raise ValueError(f"family is {family!r}, but it must be one of {', '.join(map(repr, get_args(Family)))}.")
    if not pairs:
        raise ValueError("there are 0 LoRA modules, but a file needs at least one. Check the target modules.")
    for module, pair in pairs.items():
        _check_pair(module, pair, rank)
    if layout == "kohya" and family != "unet":
        return _kohya(fused({name: (a, _fold(b, alpha / rank)) for name, (a, b) in pairs.items()}, family))
    if family == "unet" and layout != "diffusers":
        return _kohya({name: (a, b, alpha) for name, (a, b) in pairs.items()})
    return _peft(pairs, alpha / rank, family)


def parse_state(state: Mapping[str, Tensor], module_names: Iterable[str] | None = None) -> dict[str, Pair]:
    """Read any of the layouts back as {diffusers module: (A, B)}, alpha / rank in B.

    Underscored keys do not say where the dots were, nor originals what diffusers calls them: they need the model's
    `module_names`. Keys of text encoders are left out with a warning.
    """
    names = list(module_names or ())
    dotted, original = _underscore_index(names), _original_index(names)
    parts: dict[str, dict[str, Tensor]] = {}
    skipped = [key for key in state if key.startswith(_TEXT)]
    for key, tensor in state.items():
        if not key.startswith(_TEXT):
            name, part = _split_key(key, dotted, original)
            parts.setdefault(name, {})[part] = tensor
    if skipped:
        warnings.warn(
            f"{len(skipped)} keys of text encoders, such as {skipped[0]}, are left out: only the denoiser has a LoRA.",
            stacklevel=2,
        )
        if not parts:
            raise ValueError("there are 0 LoRA weights of the denoiser. Use a file that was trained on one.")
    pairs: dict[str, Pair] = {}
    for name, found in parts.items():
        pair = _join(name, found)
        for module, part in original.get(name) or [(name, None)]:
            pairs[module] = _part(name, pair, part)
    return pairs


def fused(pairs: Mapping[str, Pair], family: Family) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{original module: (A, B, alpha)}: parts of one original module become blocks of its A and B, alpha its rank."""
    places = original_names(pairs, family)
    lost = sorted(set(pairs) - set(places))
    if lost:
        raise ValueError(f"{lost[0]} has no name in kohya's layout for {family}. Use the 'diffusers' layout.")
    groups: dict[str, dict[int | None, Pair]] = {}
    for module, (name, part) in places.items():
        groups.setdefault(name, {})[part] = pairs[module]
    found = {}
    for name, parts in groups.items():
        a = torch.cat([pair[0].detach() for pair in parts.values()])
        found[name] = (a, _blocks(name, parts), float(len(a)))
    return found


def _blocks(name: str, parts: Mapping[int | None, Pair]) -> Tensor:
    """B of a module from those of its parts, block by block; a part that is not there has rows of zeros."""
    if None in parts:
        return parts[None][1].detach()
    hidden, some = next(iter(parts.values()))[0].shape[1], next(iter(parts.values()))[1]
    sizes = {0: hidden, 1: hidden, 2: hidden} | ({3: _MLP_RATIO * hidden} if name.endswith("linear1") else {})
    columns = []
    for part, (a, b) in parts.items():
        rows = [b.detach() if k == part else some.new_zeros(size, len(a)) for k, size in sizes.items()]
        columns.append(torch.cat(rows))
    return torch.cat(columns, 1)


def _part(name: str, pair: Pair, part: int | None) -> Pair:
    """One part of a module with q, k and v in one; factors that do not reach it are dropped."""
    a, b = pair
    if part is None:
        return pair
    hidden = a.shape[1]
    if len(b) < 3 * hidden:
        raise ValueError(f"{name} has {len(b)} rows, but q, k and v of {hidden} each need {3 * hidden}. The file is "
                         "of another model.")  # fmt: skip
    b = b[part * hidden : (part + 1) * hidden] if part < 3 else b[3 * hidden :]
    used = b.ne(0).any(0)
    used[0] |= ~used.any()  # a part that was not trained is one factor of zeros
    return a[used].contiguous(), b[:, used].contiguous()


def _original_index(names: list[str]) -> dict[str, list[Place]]:
    """{original name, dotted and underscored: [(diffusers module, part)]}."""
    index: dict[str, list[Place]] = {}
    for module, (name, part) in original_names(names, family_of(names)).items():
        for spelling in {name, name.replace(".", "_")}:
            index.setdefault(spelling, []).append((module, part))
    return index


def _kohya(pairs: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
    _underscore_index(pairs)
    state = {}
    for module, (a, b, alpha) in pairs.items():
        name = kohya_unet_name(module)
        state[f"{name}.lora_down.weight"] = a.detach().contiguous()
        state[f"{name}.lora_up.weight"] = b.detach().contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(alpha))
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


def _split_key(key: str, dotted: Mapping[str, str], original: Mapping[str, list[Place]]) -> tuple[str, str]:
    """(diffusers or original module, "A", "B" or "alpha") of a key."""
    suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
    if suffix:
        name = key[: -len(suffix)]
        for prefix in _DOTTED:
            if name.startswith(prefix):
                return name[len(prefix) :], _SUFFIXES[suffix]
        for prefix in _UNDERSCORED:
            flat = name.removeprefix(prefix)
            if flat != name:
                return flat if flat in original else _restore_dots(flat, key, dotted), _SUFFIXES[suffix]
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
