"""The exported LoRA has the keys each program reads, and reads back the same."""

import pytest
import torch

from comfyui_pcpo.lora.families import LORA_FAMILIES, LoraFamily, detect_family, original_names
from comfyui_pcpo.lora.formats import export_state, kohya_unet_name, parse_state

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
LAYOUTS = ["comfyui", "diffusers", "kohya"]
SINGLE = "single_transformer_blocks.0."
DOUBLE = "transformer_blocks.1."
SHAPES = {
    "unet": {LINEAR: (5, 6), CONV: (4, 3, 3, 3)},
    "sd3": {DOUBLE + "attn.to_out.0": (6, 6), DOUBLE + "attn.to_k": (6, 6), DOUBLE + "attn.add_v_proj": (6, 6)},
    "flux": {DOUBLE + "ff.net.2": (6, 9), SINGLE + "attn.to_q": (6, 6), SINGLE + "proj_mlp": (24, 6)},
    "qwen": {DOUBLE + "attn.to_k": (6, 6), DOUBLE + "img_mlp.net.2": (6, 9)},
    "flux2": {SINGLE + "attn.to_qkv_mlp_proj": (54, 6), SINGLE + "attn.to_out": (6, 24)},
    "krea2": {DOUBLE + "attn.to_gate": (6, 6), "text_fusion.refiner_blocks.1.ff.down": (6, 9)},
    "z_image": {"layers.0.attention.to_out.0": (6, 6), "layers.0.feed_forward.w1": (9, 6)},
}
FAMILIES = list(SHAPES)


def pairs(rank=2, family="unet"):
    g = torch.Generator().manual_seed(0)
    factors = {}
    for name, (out, *rest) in SHAPES[family].items():
        up = (out, rank, *[1] * (len(rest) - 1))
        factors[name] = (torch.randn(rank, *rest, generator=g), torch.randn(up, generator=g))
    return factors


def update(a, b, scale=1.0):
    return scale * b.flatten(1) @ a.flatten(1)


def applied(state):
    """The update of each key's module as ComfyUI computes it: alpha / rank, or 1 without alpha."""
    updates = {}
    for up in [k for k in state if k.endswith(("lora_up.weight", "lora_B.weight"))]:
        down = up.replace("lora_up", "lora_down").replace("lora_B", "lora_A")
        alpha = state.get(up.rsplit(".", 2)[0] + ".alpha")
        updates[up.rsplit(".", 2)[0]] = update(
            state[down], state[up], alpha / len(state[down]) if alpha is not None else 1
        )
    return updates


@pytest.mark.parametrize(
    ("family", "layout", "name"),
    [
        ("unet", "comfyui", kohya_unet_name(LINEAR)),
        ("unet", "kohya", kohya_unet_name(LINEAR)),
        ("unet", "diffusers", f"unet.{LINEAR}"),
        ("sd3", "comfyui", f"transformer.{DOUBLE}attn.to_k"),
        ("sd3", "diffusers", f"transformer.{DOUBLE}attn.to_k"),
        ("sd3", "kohya", "lora_unet_joint_blocks_1_x_block_attn_qkv"),
        ("sd3", "kohya", "lora_unet_joint_blocks_1_context_block_attn_qkv"),
        ("flux", "comfyui", f"transformer.{SINGLE}proj_mlp"),
        ("flux", "diffusers", f"transformer.{SINGLE}proj_mlp"),
        ("flux", "kohya", "lora_unet_single_blocks_0_linear1"),
        ("flux", "kohya", "lora_unet_double_blocks_1_img_mlp_2"),
        ("qwen", "comfyui", f"transformer.{DOUBLE}attn.to_k"),
        ("qwen", "kohya", "lora_unet_transformer_blocks_1_attn_to_k"),
        ("flux2", "kohya", "lora_unet_single_blocks_0_linear1"),
        ("krea2", "kohya", "lora_unet_txtfusion_refiner_blocks_1_mlp_down"),
        ("z_image", "kohya", "lora_unet_layers_0_attention_out"),
    ],
)
def test_each_layout_has_the_names_its_readers_know(family, layout, name):
    keys = {k for k in export_state(pairs(2, family), 4.0, 2, layout, family) if k.startswith(name + ".")}
    underscored = {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert keys == (underscored if name.startswith("lora_") else {f"{name}.lora_A.weight", f"{name}.lora_B.weight"})


def test_kohya_unet_name_underscores_the_module():
    assert kohya_unet_name(LINEAR) == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_applies_the_same_update_with_alpha_once(layout, family):
    given = pairs(2, family)
    updates = applied(export_state(given, 6.0, 2, layout, family))
    expected = [update(a, b, 6.0 / 2) for a, b in given.values()]
    if layout == "kohya" and family == "sd3":
        zero = torch.zeros(6, 6)
        expected = [expected[0], torch.cat([zero, expected[1], zero]), torch.cat([zero, zero, expected[2]])]
    if layout == "kohya" and family == "flux":
        expected = [expected[0], torch.cat([expected[1], torch.zeros(12, 6), expected[2]])]
    for ours, theirs in zip(updates.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [2.0, 6.0])
def test_a_file_reads_back_with_alpha_folded(layout, family, alpha):
    given = pairs(2, family)
    back = parse_state(export_state(given, alpha, 2, layout, family), given)
    assert back.keys() == given.keys()
    for name, (a, b) in given.items():
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
    with pytest.raises(ValueError, match="none of the 0 given module names"):
        parse_state(state)


def test_two_modules_with_one_underscored_name_are_refused():
    a, b = pairs()[LINEAR]
    clash = {"a.b": (a, b), "a_b": (a, b)}
    with pytest.raises(ValueError, match=r"modules a.b and a_b are both a_b"):
        export_state(clash, 2.0, 2, "kohya", "unet")
    with pytest.raises(ValueError, match="both a_b"):
        parse_state({}, clash)
    assert parse_state(export_state(clash, 2.0, 2, "diffusers", "unet")).keys() == clash.keys()


@pytest.mark.parametrize("key", ["lora_prior_a.lora_up.weight", "unet.a.lora_mid.weight", "unet.a.dora_scale"])
def test_a_foreign_key_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"key {key} is not a LoRA weight"):
        parse_state({key: torch.zeros(1)})


def test_half_a_pair_is_refused():
    with pytest.raises(ValueError, match="m lacks its LoRA B"):
        parse_state({"unet.m.lora_A.weight": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: export_state({}, 2.0, 2, "kohya", "unet"), "has no modules"),
        (lambda: export_state(pairs(), 2.0, 2, "a1111", "unet"), "layout is 'a1111'"),  # type: ignore[arg-type]
        (lambda: export_state(pairs(), 2.0, 2, "kohya", "wan"), "family is 'wan'.* 'unet', 'flux2', 'flux'"),  # type: ignore[arg-type]
        (lambda: export_state(pairs(), 2.0, 4, "kohya", "unet"), "has rank 2, but rank is 4"),
        (lambda: export_state({"m": (torch.zeros(2, 3), torch.zeros(2, 3))}, 2, 2, "kohya", "unet"), "m has A"),
    ],
)
def test_export_errors_name_the_number_and_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "key", ["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "text_encoder.text_model.q_proj.lora_A.weight"]
)
def test_keys_of_text_encoders_are_skipped_with_a_warning(key):
    state = export_state(pairs(), 2.0, 2, "diffusers", "unet")
    with pytest.warns(UserWarning, match=f"1 keys of text encoders, such as {key}: only the denoiser"):
        assert parse_state({**state, key: torch.zeros(2, 2)}).keys() == pairs().keys()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no LoRA weights of the denoiser"):
        parse_state({key: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("family", "module", "name", "part"),
    [
        ("unet", "down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in", None),
        ("unet", "down_blocks.2.resnets.1.conv_shortcut", "input_blocks.8.0.skip_connection", None),
        ("unet", "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", None),
        ("unet", "mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1", None),
        ("unet", "mid_block.attentions.0.proj_out", "middle_block.1.proj_out", None),
        ("unet", "up_blocks.0.resnets.2.conv2", "output_blocks.2.0.out_layers.3", None),
        ("unet", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", None),
        ("unet", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.1.conv", None),
        ("sd3", "transformer_blocks.7.attn2.to_v", "joint_blocks.7.x_block.attn2.qkv", 2),
        ("flux", "transformer_blocks.7.attn.add_k_proj", "double_blocks.7.txt_attn.qkv", 1),
        ("flux", "single_transformer_blocks.7.proj_out", "single_blocks.7.linear2", None),
    ],
)
def test_modules_have_the_original_checkpoints_names(family, module, name, part):
    """Places of SDXL's blocks, two resnets per level, attention in the first two levels up."""
    others = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.1.conv1", "up_blocks.0.attentions.0.proj_in"]
    assert original_names([module, *others * (family == "unet")], family)[module] == (name, part)


def test_a_fused_file_of_another_width_is_refused():
    state = {"lora_unet_joint_blocks_1_x_block_attn_qkv.lora_down.weight": torch.zeros(2, 8),
             "lora_unet_joint_blocks_1_x_block_attn_qkv.lora_up.weight": torch.zeros(18, 2)}  # fmt: skip
    with pytest.raises(ValueError, match="has 18 rows, but q, k and v of 8 each need 24"):
        parse_state(state, pairs(2, "sd3"))


@pytest.mark.parametrize(
    ("module", "family"),
    [
        (LINEAR, "unet"),
        (SINGLE + "attn.to_q", "flux"),
        (DOUBLE + "img_mlp.net.2", "qwen"),
        (DOUBLE + "attn.to_q", "sd3"),
        (SINGLE + "attn.to_qkv_mlp_proj", "flux2"),
        (DOUBLE + "ff.linear_in", "flux2"),
        (DOUBLE + "attn.to_gate", "krea2"),
        ("layers.0.attention.to_q", "z_image"),
        ("layers.0.self_attention.to_q", "ernie"),
        ("double_stream_blocks.0.block.attn1.to_q", "hidream"),
        ("joint_blocks.0.attn.to_q", "plain"),
    ],
)
def test_module_names_tell_the_family(module, family):
    assert detect_family([module]) == family


def test_a_transformer_with_cross_attention_is_not_taken_for_sd3():
    blocks = [f"transformer_blocks.0.{part}" for part in ("attn1.to_q", "attn2.to_q", "ff.net.0.proj")]
    assert detect_family(blocks) == "plain"
    assert detect_family([f"down_blocks.0.attentions.0.{part}" for part in blocks]) == "unet"


def test_a_family_with_diffusers_names_needs_no_entry_but_for_kohyas_layout():
    module = "joint_blocks.0.attn.to_q"
    given = {module: (torch.ones(2, 4), torch.ones(4, 2))}
    for layout in ("comfyui", "diffusers"):
        back = parse_state(export_state(given, 2.0, 2, layout, detect_family(given)), given)
        assert back.keys() == given.keys()
    with pytest.raises(ValueError, match="original checkpoint, which are not known for this model"):
        export_state(given, 2.0, 2, "kohya", detect_family(given))


def test_comfyuis_own_names_are_for_comfyui_only():
    given = {"blocks.0.self_attn.q": (torch.ones(2, 4), torch.ones(4, 2))}
    keys = {layout: set(export_state(given, 2.0, 2, layout, "core")) for layout in ("comfyui", "kohya")}
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in keys["comfyui"]
    assert "lora_unet_blocks_0_self_attn_q.lora_up.weight" in keys["kohya"]
    with pytest.raises(ValueError, match="ComfyUI's module names, for which diffusers has no equivalent"):
        export_state(given, 2.0, 2, "diffusers", "core")


def test_a_family_with_names_of_its_own_is_one_entry(monkeypatch):
    def original(modules):
        return {m: (m.replace("layers.", "blocks."), None) for m in modules}

    monkeypatch.setitem(LORA_FAMILIES, "lumina", LoraFamily(mark=r"layers\.", original=original))
    given = {"layers.0.to_q": (torch.ones(2, 4), torch.ones(4, 2))}
    assert detect_family(given) == "lumina"
    state = export_state(given, 2.0, 2, "kohya", "lumina")
    assert "lora_unet_blocks_0_to_q.lora_up.weight" in state
    assert parse_state(state, given).keys() == given.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"lora_A": torch.zeros(0, 4), "lora_B": torch.zeros(4, 0)},
        {"lora_A": torch.tensor(1.0)},
        {"alpha": torch.ones(2)},
    ],
)
def test_a_pair_without_rows_and_an_alpha_of_two_numbers_are_refused(change):
    parts = {"lora_A": torch.zeros(2, 4), "lora_B": torch.zeros(4, 2), "alpha": torch.tensor(2.0), **change}
    state = {f"unet.a.{part}" + ".weight" * (part != "alpha"): tensor for part, tensor in parts.items()}
    with pytest.raises(ValueError, match=r"^a has A .* The file is damaged"):
        parse_state(state)


def test_factors_in_8_bits_are_read_in_32():
    state = {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)}
    low = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items()}
    for read, given in zip(parse_state(low)["a"], parse_state(state)["a"], strict=True):
        assert torch.equal(read, given)
