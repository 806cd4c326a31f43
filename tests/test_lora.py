"""The exported LoRA has the keys each program reads, and reads back the same."""

import pytest
import torch

from comfyui_pcpo.lora import export_state, kohya_unet_name, parse_state

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
LAYOUTS = ["comfyui", "diffusers", "kohya"]
FAMILIES = ["unet", "sd3", "flux"]


def pairs(rank=2):
    g = torch.Generator().manual_seed(0)
    shapes = {LINEAR: ((rank, 6), (5, rank)), CONV: ((rank, 3, 3, 3), (4, rank, 1, 1))}
    return {name: (torch.randn(a, generator=g), torch.randn(b, generator=g)) for name, (a, b) in shapes.items()}


def update(a, b, scale=1.0):
    return scale * b.flatten(1) @ a.flatten(1)


def applied(state):
    """The update of each key's module as ComfyUI computes it: alpha / rank, or 1 without alpha."""
    found = {}
    for up in [k for k in state if k.endswith(("lora_up.weight", "lora_B.weight"))]:
        down = up.replace("lora_up", "lora_down").replace("lora_B", "lora_A")
        alpha = state.get(up.rsplit(".", 2)[0] + ".alpha")
        found[up.rsplit(".", 2)[0]] = update(
            state[down], state[up], alpha / len(state[down]) if alpha is not None else 1
        )
    return found


@pytest.mark.parametrize(
    ("family", "layout", "name"),
    [
        ("unet", "comfyui", kohya_unet_name(LINEAR)),
        ("unet", "kohya", kohya_unet_name(LINEAR)),
        ("unet", "diffusers", f"unet.{LINEAR}"),
        ("sd3", "comfyui", f"transformer.{LINEAR}"),
        ("sd3", "diffusers", f"transformer.{LINEAR}"),
        ("flux", "comfyui", f"transformer.{LINEAR}"),
        ("flux", "diffusers", f"transformer.{LINEAR}"),
        ("flux", "kohya", "lora_transformer_" + LINEAR.replace(".", "_")),
    ],
)
def test_each_layout_has_the_names_its_readers_know(family, layout, name):
    keys = {k for k in export_state(pairs(), 4.0, 2, layout, family) if k.startswith(name + ".")}
    underscored = {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert keys == (underscored if name.startswith("lora_") else {f"{name}.lora_A.weight", f"{name}.lora_B.weight"})


def test_kohya_unet_name_underscores_the_module():
    assert kohya_unet_name(LINEAR) == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_applies_the_same_update_with_alpha_once(layout, family):
    state = export_state(pairs(), 6.0, 2, layout, family)
    for (a, b), found in zip(pairs().values(), applied(state).values(), strict=True):
        assert torch.allclose(found, update(a, b, 6.0 / 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [2.0, 6.0])
def test_a_file_reads_back_with_alpha_folded(layout, family, alpha):
    state = export_state(pairs(), alpha, 2, layout, family)
    back = parse_state(state, pairs())
    assert back.keys() == pairs().keys()
    for name, (a, b) in pairs().items():
        assert torch.equal(back[name][0], a)
        assert torch.equal(back[name][1], b * (alpha / 2))


def test_dotted_layouts_need_no_module_names():
    assert parse_state(export_state(pairs(), 2.0, 2, "diffusers", "flux")).keys() == pairs().keys()


def test_exported_tensors_keep_their_dtype_and_are_ready_to_save():
    a, b = torch.randn(6, 2).T.bfloat16().requires_grad_(), torch.randn(5, 2).bfloat16().requires_grad_()
    for layout in LAYOUTS:
        for key, tensor in export_state({LINEAR: (a, b)}, 3.0, 2, layout, "unet").items():
            assert tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.dtype == (torch.float32 if key.endswith("alpha") else torch.bfloat16)


def test_underscored_keys_need_the_module_names():
    state = export_state(pairs(), 2.0, 2, "kohya", "unet")
    with pytest.raises(ValueError, match="none of the 0 module names"):
        parse_state(state)


def test_two_modules_with_one_underscored_name_are_refused():
    a, b = pairs()[LINEAR]
    clash = {"a.b": (a, b), "a_b": (a, b)}
    with pytest.raises(ValueError, match=r"modules a.b and a_b are both a_b"):
        export_state(clash, 2.0, 2, "kohya", "unet")
    with pytest.raises(ValueError, match="both a_b"):
        parse_state({}, clash)
    assert parse_state(export_state(clash, 2.0, 2, "diffusers", "unet")).keys() == clash.keys()


@pytest.mark.parametrize("key", ["lora_te_text_model.lora_up.weight", "unet.a.lora_mid.weight", "text_encoder.a.alpha"])
def test_a_foreign_key_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"key {key} is not a LoRA weight"):
        parse_state({key: torch.zeros(1)})


def test_half_a_pair_is_refused():
    with pytest.raises(ValueError, match="m lacks its LoRA B"):
        parse_state({"unet.m.lora_A.weight": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: export_state({}, 2.0, 2, "kohya", "unet"), "0 LoRA modules"),
        (lambda: export_state(pairs(), 2.0, 2, "a1111", "unet"), "layout is 'a1111'"),  # type: ignore[arg-type]
        (lambda: export_state(pairs(), 2.0, 2, "kohya", "wan"), "family is 'wan'"),  # type: ignore[arg-type]
        (lambda: export_state(pairs(), 2.0, 4, "kohya", "unet"), "has rank 2, but rank is 4"),
        (lambda: export_state({"m": (torch.zeros(2, 3), torch.zeros(2, 3))}, 2, 2, "kohya", "unet"), "m has A"),
    ],
)
def test_export_errors_name_the_number_and_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
