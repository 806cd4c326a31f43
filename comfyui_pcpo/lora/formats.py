"""LoRA state dicts in the key layouts that ComfyUI, diffusers and kohya's tools read.

A pair is (A, B): A (r, in) or (r, in, k, k) is applied first, B (out, r) or (out, r, 1, 1) second;
the update is alpha / r B A.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from comfyui_pcpo.lora.families import LORA_FAMILIES, Family, LoraFamily, detect_family, original_names

Layout = Literal["comfyui", "diffusers", "kohya"]
Pair = tuple[Tensor, Tensor]

_DOTTED = ("transformer.", "unet.", "diffusion_model.", "base_model.model.")
_UNDERSCORED = ("lora_transformer_", "lora_unet_")
_TEXT = ("lora_te", "text_encoder", "clip_", "t5xxl")
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
    kohya of other families    the same with the original checkpoint's names, q, k and v as one module
    everything else            unet.<name> or transformer.<name> + .lora_A.weight, .lora_B.weight; alpha / rank is in B
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout is {layout!r}, but must be one of {', '.join(map(repr, get_args(Layout)))}.")
    if family not in LORA_FAMILIES:
        raise ValueError(f"family is {family!r}, but must be one of {', '.join(map(repr, LORA_FAMILIES))}.")
    if not pairs:
        raise ValueError("The LoRA has no modules, so there is nothing to export. Check the target modules.")
    for module, pair in pairs.items():
        _check_pair(module, pair, rank)
    names = LORA_FAMILIES[family]
    _check_layout(layout, family)
    if layout == "diffusers" or (layout == "comfyui" and not names.underscored):
        return _peft(pairs, alpha / rank, names.prefix)
    if names.underscored:
        return _kohya({name: (a, b, alpha) for name, (a, b) in pairs.items()})
    return _kohya(fused({name: (a, _fold(b, alpha / rank)) for name, (a, b) in pairs.items()}, family))


def _check_layout(layout: Layout, family: Family) -> None:
    """Refuse a layout in which no program would find the family's modules."""
    names = LORA_FAMILIES[family]
    if layout == "kohya" and names.original is None:
        raise ValueError(
            "kohya's layout has the module names of the original checkpoint, which are not known for this model. "
            "Use the comfyui or the diffusers layout."
        )
    if layout == "diffusers" and not names.diffusers:
        raise ValueError(
            "This LoRA has ComfyUI's module names, for which diffusers has no equivalent. "
            "Use the comfyui or the kohya layout."
        )


def parse_state(state: Mapping[str, Tensor], module_names: Iterable[str] | None = None) -> dict[str, Pair]:
    """Read any of the layouts back as {diffusers module: (A, B)}, alpha / rank in B.

    Underscored keys and original names map to diffusers' modules only with the model's `module_names`. Keys of text
    encoders are skipped with a warning.
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
            f"Skipping {len(skipped)} keys of text encoders, such as {skipped[0]}: only the denoiser can have a LoRA.",
            stacklevel=2,
        )
        if not parts:
            raise ValueError("The file has no LoRA weights of the denoiser. Use one that was trained on the denoiser.")
    pairs: dict[str, Pair] = {}
    for name, tensors in parts.items():
        pair = _join(name, tensors)
        for module, part in original.get(name) or [(name, None)]:
            pairs[module] = _part(name, pair, part)
    return pairs


def fused(pairs: Mapping[str, Pair], family: Family) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{original module: (A, B, alpha)}: parts of one original module become blocks of its A and B, alpha its rank."""
    places = original_names(pairs, family)
    unnamed = sorted(set(pairs) - set(places))
    if unnamed:
        raise ValueError(f"{unnamed[0]} has no name in kohya's layout for {family}. Use the 'diffusers' layout.")
    groups: dict[str, dict[int | None, Pair]] = {}
    for module, (name, part) in places.items():
        groups.setdefault(name, {})[part] = pairs[module]
    modules = {}
    for name, parts in groups.items():
        a = torch.cat([pair[0].detach() for pair in parts.values()])
        modules[name] = (a, _blocks(name, parts, LORA_FAMILIES[family]), float(len(a)))
    return modules


def _blocks(name: str, parts: Mapping[int | None, Pair], family: LoraFamily) -> Tensor:
    """B of an original module from those of its parts, block by block; a missing part has rows of zeros."""
    if None in parts:
        return parts[None][1].detach()
    (first_a, first_b), *_ = parts.values()
    hidden = first_a.shape[1]
    mlp = next((ratio * hidden for end, ratio in family.mlp_ratio.items() if name.endswith(end)), 0)
    sizes = {0: hidden, 1: hidden, 2: hidden, 3: mlp}
    columns = []
    for part, (a, b) in parts.items():
        rows = [b.detach() if k == part else first_b.new_zeros(size, len(a)) for k, size in sizes.items()]
        columns.append(torch.cat(rows))
    return torch.cat(columns, 1)


def _part(name: str, pair: Pair, part: int | None) -> Pair:
    """One part of a fused q, k, v module; rank components that do not affect it are dropped."""
    a, b = pair
    if part is None:
        return pair
    hidden = a.shape[1]
    if len(b) < 3 * hidden:
        raise ValueError(
            f"{name} has {len(b)} rows, but q, k and v of {hidden} each need {3 * hidden}. "
            "Use a file that was trained on this model."
        )
    b = b[part * hidden : (part + 1) * hidden] if part < 3 else b[3 * hidden :]
    used = b.ne(0).any(0)
    used[0] |= ~used.any()  # an untrained part keeps one component of zeros
    return a[used].contiguous(), b[:, used].contiguous()


def _original_index(names: list[str]) -> dict[str, list[tuple[str, int | None]]]:
    """{original name, dotted and underscored: [(diffusers module, part)]}."""
    index: dict[str, list[tuple[str, int | None]]] = {}
    for module, (name, part) in original_names(names, detect_family(names)).items():
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


def _peft(pairs: Mapping[str, Pair], scale: float, prefix: str) -> dict[str, Tensor]:
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
        raise ValueError(f"{module} has rank {a.shape[0]}, but rank is {rank}. Export modules of equal rank.")


def _underscore_index(names: Iterable[str]) -> dict[str, str]:
    """{underscored: dotted}; refuses two modules with the same underscored name."""
    index: dict[str, str] = {}
    for name in names:
        flat = name.replace(".", "_")
        if index.setdefault(flat, name) != name:
            raise ValueError(
                f"modules {index[flat]} and {name} are both {flat} when underscored. "
                "Use the 'diffusers' layout for this model."
            )
    return index


def _split_key(key: str, dotted: Mapping[str, str], original: Container[str]) -> tuple[str, str]:
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
            f"key {key} matches none of the {len(dotted)} given module names, which underscored keys need. "
            "Pass module_names of the model that the file was trained on."
        )
    return dotted[flat]


def _join(module: str, tensors: Mapping[str, Tensor]) -> Pair:
    """(A, B) of a module with alpha / rank in B; no alpha means alpha = rank."""
    missing = [part for part in ("A", "B") if part not in tensors]
    if missing:
        raise ValueError(f"{module} lacks its LoRA {missing[0]}, but needs both A and B. The file is incomplete.")
    a, b = (t.float() if t.is_floating_point() and t.element_size() == 1 else t for t in (tensors["A"], tensors["B"]))
    alpha = tensors.get("alpha")
    if a.ndim == 0 or len(a) == 0 or (alpha is not None and alpha.numel() != 1):
        given = "none" if alpha is None else tuple(alpha.shape)
        raise ValueError(
            f"{module} has A {tuple(a.shape)} and alpha {given}, but needs at least one row in A, and one number as "
            "alpha. The file is damaged."
        )
    _check_pair(module, (a, b), len(a))
    scale = 1.0 if alpha is None else alpha.item() / len(a)
    return a, _fold(b, scale)
