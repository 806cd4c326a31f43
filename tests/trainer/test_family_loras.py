"""A LoRA of every family does in diffusers, and back in the trainer, what it did in training."""

import copy

import diffusers
import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file

from comfyui_pcpo.lora.formats import export_state
from trainer.config.schema import ConfigError
from trainer.evaluation.sampling import sampling_policy
from trainer.evaluation.source import read_pairs
from trainer.policy.diffusers_policy import DiffusersPolicy, module_names, order_channels_last
from trainer.policy.families import denoiser_of
from trainer.policy.loading import make_policy
from trainer.policy.lora_pairs import folded, padded, started

pytestmark = pytest.mark.slow

SIZE = {"height": tiny_pipelines.SIDE, "width": tiny_pipelines.SIDE}
LAYOUTS = ("comfyui", "diffusers", "kohya")
UNREAD = {
    ("kohya", "sd3"): "diffusers reads no kohya file of SD3",
    ("kohya", "sd35"): "diffusers reads no kohya file of SD3",
    ("kohya", "flux"): "diffusers reads kohya's FLUX files at FLUX's full width only",
    ("kohya", "qwen-image-2.1"): "diffusers takes the underscore of gate_layer for a dot",
    ("kohya", "krea2"): "diffusers reads no kohya file of Krea 2",
    ("kohya", "chroma"): "diffusers reads kohya's FLUX files at FLUX's full width only",
}


@pytest.fixture(scope="module")
def pipelines():
    return {name: tiny_pipelines.build(name) for name in tiny_pipelines.PIPELINES}


@pytest.fixture(params=tiny_pipelines.LORAS)
def family(request) -> str:
    return request.param


def trained_policy(pipeline, config):
    """A policy whose LoRA moves the model plainly, with an alpha that is not the rank."""
    policy = DiffusersPolicy(copy.deepcopy(pipeline), config)
    generator = torch.Generator().manual_seed(1)
    for p in policy.trainable():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return policy


@pytest.fixture
def config(pipelines, family, make_config):
    return config_of(pipelines[family], make_config)


def config_of(pipeline, make_config):
    size = tiny_pipelines.size(pipeline)
    return make_config("given", rollout=size, lora={"rank": 2, "alpha": 1.0, "targets": "all"})


def write(policy, layout, path):
    rank = policy.config.lora.rank
    state = export_state(folded(policy.lora(), policy.config.lora.scale), rank, rank, layout, policy.family)
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def predicted(policy):
    """With and without the LoRA, from fixed noise."""
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = policy.encode(["a fox"])
    with torch.no_grad(), policy.reference():
        base = policy.predict(x, 500, condition)
    with torch.no_grad():
        return policy.predict(x, 500, condition), base


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_loads_in_diffusers_as_the_trained_policy(pipelines, family, layout, config, tmp_path):
    if (layout, family) in UNREAD:
        pytest.skip(UNREAD[layout, family])
    policy = trained_policy(pipelines[family], config)
    expected, base = predicted(policy)
    assert (expected - base).abs().max() > 1e-2
    path = write(policy, layout, tmp_path / "lora.safetensors")

    plain = copy.deepcopy(pipelines[family])
    untrained = DiffusersPolicy(copy.deepcopy(plain), config)
    untrained.adapter.denoiser = denoiser_of(plain)  # the plain pipeline's model, called the same way
    order_channels_last(denoiser_of(plain))
    plain.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="run")
    torch.testing.assert_close(predicted_plain(untrained), expected, rtol=1e-4, atol=1e-4)
    plain.set_adapters(["run"], [0.0])
    assert torch.equal(predicted_plain(untrained), base)


def predicted_plain(policy):
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.predict(x, 500, policy.encode(["a fox"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_reads_back_into_the_trainer(pipelines, family, layout, config, tmp_path):
    policy = trained_policy(pipelines[family], config)
    expected, base = predicted(policy)
    names = module_names(denoiser_of(pipelines[family]))
    pairs = read_pairs(write(policy, layout, tmp_path / "lora.safetensors"), names)
    assert pairs.keys() == policy.lora().keys()
    again = DiffusersPolicy(copy.deepcopy(pipelines[family]), config, pairs)
    again.load_lora(started(pairs, again.lora(), config.lora.scale))
    found, still = predicted(again)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(still, base)


# a user's kohya files, with the original checkpoints' names and q, k and v in one: (in, out) of some layers
KOHYA = {
    "sdxl": {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (32, 32),
        "lora_unet_input_blocks_1_1_proj_in": (32, 32),
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_v": (40, 64),
        "lora_unet_output_blocks_3_1_proj_out": (32, 32),
    },
    "sd3": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (128, 384),
        "lora_unet_joint_blocks_1_context_block_attn_qkv": (128, 384),
        "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1": (128, 768),
    },
    "flux": {
        "lora_unet_double_blocks_0_txt_attn_qkv": (128, 384),
        "lora_unet_double_blocks_0_img_mod_lin": (128, 768),
        "lora_unet_single_blocks_1_linear1": (128, 896),
        "lora_unet_single_blocks_1_linear2": (640, 128),
    },
}


@pytest.mark.parametrize("family", KOHYA)
def test_training_starts_from_a_users_kohya_file(family, make_config, tmp_path):
    """Its extra layers are trained too, its fused ones by their parts, its text encoder's are left out in words."""
    state, expected = {}, {}
    for name, (inner, outer) in KOHYA[family].items():
        a, b = torch.randn(2, inner), torch.randn(outer, 2)
        expected[name] = 0.5 * b @ a
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)}
    state["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(4, 2)
    save_file(state, tmp_path / "user.safetensors")
    folder = tiny_pipelines.save(family, tmp_path)
    lora = {"rank": 4, "start": str(tmp_path / "user.safetensors"), "targets": "attention"}
    with pytest.warns(UserWarning, match="1 keys of text encoders"):
        policy = make_policy(make_config(str(folder), rollout=SIZE, lora=lora))
    found = {name: up @ down for name, (down, up) in policy.lora().items() if up.abs().max() > 0}
    total = sum(change.square().sum() for change in expected.values())
    torch.testing.assert_close(sum(change.square().sum() for change in found.values()), total)
    assert len(found) == {"sdxl": 4, "sd3": 3 + 3 + 1, "flux": 3 + 1 + 4 + 1}[family]
    names = {
        "sdxl": ("mid_block.attentions.0.transformer_blocks.1.attn2.to_v", slice(None), "middle_block_1_"),
        "sd3": ("transformer_blocks.1.attn.add_k_proj", slice(128, 256), "context_block_attn_qkv"),
        "flux": ("single_transformer_blocks.1.proj_mlp", slice(384, None), "linear1"),
    }
    module, rows, key = names[family]
    change = next(change for name, change in expected.items() if key in name)
    torch.testing.assert_close(found[module], change[rows])


def test_a_guide_may_train_more_layers_than_the_targets(pipelines, make_config):
    """Sampling makes room for whatever layers the LoRAs have."""
    config = config_of(pipelines["sd15"], make_config)
    module = "down_blocks.0.attentions.0.proj_in"
    pairs = {module: (torch.randn(3, 32, 1, 1), torch.randn(32, 3, 1, 1))}
    policy = sampling_policy(config, [pairs], copy.deepcopy(pipelines["sd15"]))
    assert module in policy.lora() and len(policy.lora()[module][0]) == 3


def test_a_lora_of_another_family_is_refused(pipelines, make_config):
    config = config_of(pipelines["sd15"], make_config)
    pairs = {"transformer_blocks.0.attn.to_q": (torch.randn(2, 128), torch.randn(128, 2))}
    policy = sampling_policy(config, [pairs], copy.deepcopy(pipelines["sd15"]))
    with pytest.raises(ConfigError, match=r"1 modules that this model does not train, first transformer_blocks.0"):
        padded(pairs, policy.lora())


def test_diffusers_reads_a_kohya_file_of_flux_at_its_full_width():
    """Two blocks are enough: its converter knows the widths, 3072 and four times that, and not the depth."""
    single, generator = "single_transformer_blocks.0.", torch.Generator().manual_seed(0)
    outs = {single + "attn.to_k": 3072, single + "proj_mlp": 4 * 3072, "transformer_blocks.0.attn.add_v_proj": 3072}
    pairs = {
        name: (torch.randn(2, 3072, generator=generator), torch.randn(out, 2, generator=generator))
        for name, out in outs.items()
    }
    found = diffusers.FluxPipeline.lora_state_dict(export_state(pairs, 2.0, 2, "kohya", "flux"))
    for name, (down, up) in pairs.items():
        a, b = (found[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close((b @ a)[:50], (up @ down)[:50])
