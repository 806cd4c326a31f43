"""Writes a tiny pipeline as the one file that its original code, and so ComfyUI, would have."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from comfyui_pcpo.lora.families import detect_family, original_names

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_NORMS = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}


def unet(core):
    state, modules = core.state_dict(), [key.rpartition(".")[0] for key in core.state_dict()]
    places = {name: place for name, (place, _) in original_names(modules, "unet").items()} | UNET_ENDS
    found = {}
    for key, value in state.items():
        module, _, end = key.rpartition(".")
        name = (
            re.sub(r"(\.\d+\.\d+)\.norm1$", r"\1.in_layers.0", places[module]) if ".resnets." in key else places[module]
        )
        name = (
            re.sub(r"(\.\d+\.\d+|middle_block\.\d)\.norm2$", r"\1.out_layers.0", name) if ".resnets." in key else name
        )
        name = re.sub(r"(middle_block\.\d)\.norm1$", r"\1.in_layers.0", name) if ".resnets." in key else name
        found[f"{name}.{end}"] = value
    return found


def vae(core, levels=2):
    found = {}
    for key, value in core.state_dict().items():
        key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
        key = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)
        key = re.sub(r"(up\.\d)\.resnets\.(\d)", r"\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = key.replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut")
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        if ".attn_1." in key:
            key = key.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            key = re.sub(r"to_([qkv])\.", r"\1.", key)
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[key] = value
    return found


def clip(core):
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in core.state_dict().items()}


def open_clip(core):
    """The second text encoder in open_clip's layout: q, k and v in one, the projection transposed."""
    state, found = {k.removeprefix("text_model."): v for k, v in core.state_dict().items()}, {}
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    parts = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for key, value in state.items():
        if key in ends:
            found[ends[key]] = value
        elif key == "text_projection.weight":
            found["text_projection"] = value.T
        elif key.startswith("encoder.layers."):
            number, inner, end = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key).groups()
            if inner in parts:
                found[f"transformer.resblocks.{number}.{parts[inner]}.{end}"] = value
            elif inner == "self_attn.q_proj":
                rows = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                found[f"transformer.resblocks.{number}.attn.in_proj_{end}"] = torch.cat(rows)
    return found


def sd3(core):
    """q, k and v in one; scale and shift of the last modulations the other way round."""
    state, fused = core.state_dict(), {}
    modules = [key.rpartition(".")[0] for key in state]
    places = {
        **original_names(modules, detect_family(modules)),
        **{name: (place, None) for name, place in SD3_ENDS.items()},
    }
    last = f"transformer_blocks.{core.config.num_layers - 1}.norm1_context.linear"
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    for key, value in state.items():
        module, _, end = key.rpartition(".")
        if module in ("norm_out.linear", last):
            value = torch.cat(value.chunk(2)[::-1])
        if module in places:
            name, part = places[module]
            fused.setdefault(f"{name}.{end}", {})[part] = value
        elif ".norm_" in module:
            _, number, inner = module.split(".", 2)
            found[f"joint_blocks.{number}.{SD3_NORMS[inner]}.{end}"] = value
    return found | {key: torch.cat([parts[p] for p in sorted(parts, key=str)]) for key, parts in fused.items()}


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def write(pipeline, path: Path, **marks: torch.Tensor) -> Path:
    """SD1.x, SD2.x and SDXL whole, of SD3 the transformer."""
    name = type(pipeline).__name__
    if name == "StableDiffusion3Pipeline":
        state = prefixed("model.diffusion_model.", sd3(pipeline.transformer))
    else:
        state = prefixed("model.diffusion_model.", unet(pipeline.unet)) | prefixed(
            "first_stage_model.", vae(pipeline.vae, len(pipeline.vae.config.block_out_channels))
        )
        if pipeline.text_encoder.config.hidden_act == "gelu":  # SD2's comes from open_clip
            width = pipeline.text_encoder.config.hidden_size
            state |= prefixed("cond_stage_model.model.", open_clip(pipeline.text_encoder))
            state["cond_stage_model.model.text_projection"] = torch.eye(width)  # in the file and not used
        elif name == "StableDiffusionPipeline":
            state |= prefixed("cond_stage_model.transformer.", clip(pipeline.text_encoder))
        else:
            state |= prefixed("conditioner.embedders.0.transformer.", clip(pipeline.text_encoder))
            state |= prefixed("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2))
    save_file({k: v.detach().contiguous().clone() for k, v in {**state, **marks}.items()}, path)
    return path
