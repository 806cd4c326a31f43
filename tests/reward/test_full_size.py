"""The published sizes: full networks on the meta device take every weight of the official layouts, to the last one."""

import math
import re

import pytest
import torch

from comfyui_pcpo.reward.aesthetic import linear_head
from comfyui_pcpo.reward.clip import VIT_H_14, VIT_L_14, open_clip_model, transformers_clip
from comfyui_pcpo.reward.hpsv3 import HPSv3Model, hpsv3_names
from comfyui_pcpo.reward.imagereward import BlipShape, imagereward_model, renamed
from comfyui_pcpo.reward.qwen2vl import QwenShape
from tests.golden import reward_recipe as gold

pytestmark = pytest.mark.slow


def grown(shapes, sizes, layers):
    """Tiny official shapes -> full ones: dimensions by kind of weight, layers repeated; meta tensors.

    `sizes` holds (name pattern, {tiny: full}); `layers` holds (name pattern, number of layers).
    """
    full = {}
    for name, shape in shapes.items():
        table = next(table for pattern, table in sizes if re.search(pattern, name))
        shape = [table.get(side, side) for side in shape]
        count = next((n for pattern, n in layers if re.search(pattern, name)), 1)
        for n in range(count):
            full[re.sub(r"(resblocks|layers?|blocks)\.0\.", rf"\1.{n}.", name)] = torch.empty(shape, device="meta")
    return full


def parameters(state):
    return sum(math.prod(tensor.shape) for tensor in state.values())


VISION_H = {160: 1280, 480: 3840, 640: 5120, 64: 1024}
TEXT_H = {64: 1024, 192: 3072, 256: 4096}


@pytest.mark.parametrize(("name", "build"), [("hpsv2", open_clip_model), ("pickscore", transformers_clip)])
def test_vit_h_14_takes_all_986_million_weights(name, build):
    sizes = [(r"^vis", VISION_H), ("", TEXT_H)]
    layers = [(r"^vis.*(resblocks|layers)\.0\.", 32), (r"(resblocks|layers)\.0\.", 24)]
    state = grown(gold.golden(name)["shapes"], sizes, layers)
    with torch.device("meta"):
        model = build(VIT_H_14)
    model.load_state_dict(state, strict=True, assign=True)
    assert round(parameters(state) / 1e6) == 986


def test_hpsv3_takes_all_weights_of_qwen2_vl_7b_but_the_output_layer():
    vision, text = {32: 1280, 96: 3840, 128: 5120, 256: 5120, 64: 3584}, {64: 3584, 32: 512, 96: 18944, 263: 151658}
    layers = [(r"^visual\.blocks\.0\.", 32), (r"^model\.layers\.0\.", 28)]
    head = {64: 3584}
    golden = gold.golden("hpsv3")["shapes"]
    shapes = {k: v for k, v in golden.items() if not re.search(r"(blocks|layers)\.1\.", k)}
    sizes = [
        (r"patch_embed", {32: 1280}),
        (r"^visual.merger.ln_q", {32: 1280}),
        (r"^visual.merger", {128: 5120, 64: 3584}),
    ]
    state = grown(shapes, [*sizes, (r"^visual", vision), (r"^rm_head", head), ("", text)], layers)
    with torch.device("meta"):
        model = HPSv3Model(QwenShape(), 151658)
    model.load_state_dict(hpsv3_names(state), strict=True, assign=True)
    qwen = {k: v for k, v in state.items() if not k.startswith("rm_head")}
    added = 151658 - 152064  # Qwen2-VL's own embedding has unused rows
    assert parameters(qwen) - 2 * added * 3584 == 8_291_375_616


def test_vit_l_14_and_its_head_take_all_weights():
    vision = {128: 1024, 384: 3072, 512: 4096, 96: 768}
    text = {64: 768, 192: 2304, 256: 3072, 96: 768}
    layers = [(r"^visual.*resblocks\.0\.", 24), (r"resblocks\.0\.", 12)]
    golden = gold.golden("aesthetic")
    state = grown(golden["shapes"], [(r"^visual", vision), ("", text)], layers)
    head = grown({k.removeprefix("layers."): v for k, v in golden["head_shapes"].items()}, [("", {96: 768})], [])
    with torch.device("meta"):
        model, top = open_clip_model(VIT_L_14), linear_head(VIT_L_14.embed)
    model.load_state_dict(state, strict=True, assign=True)
    top.load_state_dict(head, strict=True, assign=True)
    assert model.visual.transformer.resblocks[0].attn.num_heads == 16
    assert round(parameters(state) / 1e6) == 428


def test_imagereward_takes_all_447_million_weights():
    vision = {128: 1024, 384: 3072, 512: 4096}
    text = {96: 768, 384: 3072, 128: 1024}
    sizes = [
        (r"visual_encoder|vision_proj", vision),
        (r"^mlp\.layers\.0\.weight", {96: 768}),
        (r"^mlp", {}),
        ("", text),
    ]
    layers = [(r"blocks\.0\.", 24), (r"encoder\.layer\.0\.", 12)]
    shapes = {k: v for k, v in gold.golden("imagereward")["shapes"].items() if "position_embeddings" not in k}
    state = grown(shapes, sizes, layers)
    state["blip.text_encoder.embeddings.position_embeddings.weight"] = torch.empty(512, 768, device="meta")
    with torch.device("meta"):
        model = imagereward_model(BlipShape())
    model.load_state_dict(renamed(state), strict=True, assign=True)
    assert round(parameters(state) / 1e6) == 447
