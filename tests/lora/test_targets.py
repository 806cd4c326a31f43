"""The same layers get a LoRA in every family, whichever program named them."""

import pytest

from comfyui_pcpo.lora.targets import is_target

ATTENTION = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",  # SD
    "transformer_blocks.3.attn.add_q_proj",  # SD3, FLUX, Qwen-Image
    "single_transformer_blocks.3.attn.to_qkv_mlp_proj",  # FLUX.2
    "layers.3.attention.to_q",  # Z-Image
    "layers.3.attention.qkv",  # Ideogram 4
    "layers.3.self_attention.to_out.0",  # ERNIE-Image
    "double_stream_blocks.3.block.attn1.to_q_t",  # HiDream
    "transformer_blocks.3.attn.to_gate",  # Krea 2
    "blocks.3.cross_attn.k",  # Wan
    "blocks.3.self_attn.output_proj",  # Anima, Cosmos
    "blocks.block3.blocks.0.block.attn.to_q.0",  # Cosmos 1
]
FEED_FORWARD = [
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.3.ff_context.net.2",
    "transformer_blocks.3.txt_mlp.net.2",
    "single_transformer_blocks.3.proj_mlp",
    "single_transformer_blocks.3.proj_out",
    "single_transformer_blocks.3.attn.to_out",  # FLUX.2: attention and feed-forward in one
    "layers.3.feed_forward.w3",
    "layers.3.mlp.gate_proj",
    "single_stream_blocks.3.block.ff_i.experts.1.w2",
    "transformer_blocks.3.ff.up",
    "blocks.3.ffn.0",
    "blocks.3.mlp.layer1",
]
NEITHER = [
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.time_emb_proj",
    "transformer_blocks.3.norm1.linear",
    "transformer_blocks.3.img_mod.1",
    "layers.3.adaLN_modulation.0",
    "blocks.3.adaln_modulation_self_attn.1",
    "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_1",
    "llm_adapter.blocks.0.self_attn.q_proj",
    "proj_out",
]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_in_every_choice(name):
    assert all(is_target(name, targets) for targets in ("attention", "linear", "all"))


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_feed_forward_layers_are_in_linear_and_all(name):
    assert [is_target(name, targets) for targets in ("attention", "linear", "all")] == [False, True, True]


@pytest.mark.parametrize("name", NEITHER)
def test_what_surrounds_the_blocks_and_modulates_them_is_left_alone(name):
    assert not is_target(name, "all")


def test_all_adds_a_unets_convolutions():
    assert is_target("down_blocks.0.resnets.0.conv1", "all")
    assert not is_target("down_blocks.0.resnets.0.conv1", "linear")
