"""Pipelines of every family with random weights and the smallest sizes their classes take: 16 pixels, latents 8 x 8."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

TOKENIZER = Path(__file__).parents[2] / "comfyui_pcpo" / "tiny" / "models" / "shared" / "tokenizer"
SIDE = 16
LATENT_CHANNELS = 4
T5_LENGTH = 24
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content if m.content is string else m.content[0].text }}\n{% endfor %}"
)
FLOW = {"base_image_seq_len": 4, "max_image_seq_len": 64, "base_shift": 0.5, "max_shift": 1.15}


def clip(width: int, projection: bool = False, act: str = "quick_gelu") -> Any:
    """A CLIP text encoder; `projection` adds the one that SDXL and SD3 pool with."""
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width, hidden_act=act,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def clip_tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(TOKENIZER)


def t5(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def vae(shift: float | None = None) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=LATENT_CHANNELS, sample_size=SIDE,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5, shift_factor=shift, use_quant_conv=True, use_post_quant_conv=True,
    )  # fmt: skip


def ddim(prediction: str = "epsilon") -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip


def unet(width: int, **more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(32, 64),
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=width, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )  # fmt: skip


def sd15(prediction: str = "epsilon") -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(32), tokenizer=clip_tokenizer(), unet=unet(32), scheduler=ddim(prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd21() -> Any:
    """SD2: v-prediction, projections of attention blocks are linear."""
    pipeline = sd15("v_prediction")
    pipeline.register_modules(unet=unet(32, use_linear_projection=True), text_encoder=clip(32, act="gelu"))
    return pipeline


def sdxl() -> Any:
    core = unet(
        16 + 24, use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(16), text_encoder_2=clip(24, True, "gelu"), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=core, scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip


def sd3(t5_too: bool = True, **more: Any) -> Any:
    core = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2,
        attention_head_dim=64, num_attention_heads=2, caption_projection_dim=128, joint_attention_dim=40,
        pooled_projection_dim=32, pos_embed_max_size=8, **more,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(0.1), transformer=core, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(16, True), text_encoder_2=clip(16, True, "gelu"), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(40) if t5_too else None,
        tokenizer_3=t5_tokenizer() if t5_too else None,
    )  # fmt: skip


def sd35() -> Any:
    """SD3.5 medium: normed queries and keys, a second attention in some blocks."""
    return sd3(False, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux() -> Any:
    core = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=128,
        num_attention_heads=1, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **FLOW),
        vae=vae(0.1), text_encoder=clip(16), tokenizer=clip_tokenizer(), text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(), transformer=core,
    )  # fmt: skip


def qwen_image() -> Any:
    core = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2, attention_head_dim=128,
        num_attention_heads=1, joint_attention_dim=32,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, **FLOW),
        vae=qwen_vae(), text_encoder=qwen(), tokenizer=qwen_tokenizer(), transformer=core,
    )  # fmt: skip


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * LATENT_CHANNELS, latents_std=[1.5] * LATENT_CHANNELS,
    )  # fmt: skip


def krea2() -> Any:
    core = diffusers.Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=128, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
        text_num_attention_heads=1, text_num_key_value_heads=1, text_intermediate_size=128,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=qwen_vae(),
        text_encoder=qwen3_vl(2), tokenizer=qwen_tokenizer(), transformer=core, text_encoder_select_layers=(1, 2),
    )  # fmt: skip


def qwen3_vl(layers: int) -> Any:
    text = {
        "vocab_size": 264, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


def qwen_image21() -> Any:
    """Its pipeline takes 16 pixels for a latent, whatever the VAE; this one's images are 8 x 8."""
    core = diffusers.QwenImage21Transformer2DModel(
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, context_in_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    codec = diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 1], num_res_blocks=1,
        temperal_downsample=[False], latents_mean=[0.1] * LATENT_CHANNELS, latents_std=[1.5] * LATENT_CHANNELS,
    )  # fmt: skip
    return diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW), vae=codec,
        text_encoder=transformers.Qwen3VLForConditionalGeneration(qwen3_vl(2).config), processor=vision_processor(),
        transformer=core,
    )  # fmt: skip


def vision_processor() -> Any:
    tokenizer = chat_tokenizer()
    words = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(), tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(), chat_template=CHAT,
    )  # fmt: skip


def qwen() -> Any:
    text = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["<|endoftext|>"] = 256
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=[])


def z_image() -> Any:
    core = diffusers.ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(0.1), text_encoder=qwen3(3),
        tokenizer=chat_tokenizer(), transformer=core,
    )  # fmt: skip


def chroma() -> Any:
    core = diffusers.ChromaTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **FLOW),
        vae=vae(0.1), text_encoder=t5(32), tokenizer=t5_tokenizer(), transformer=core,
    )  # fmt: skip


def flux2_vae() -> Any:
    """Its batch norm has statistics, as after training."""
    codec = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=LATENT_CHANNELS, sample_size=SIDE,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    codec.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 4 * LATENT_CHANNELS))
    codec.bn.running_var.copy_(torch.linspace(0.5, 2, 4 * LATENT_CHANNELS))
    return codec


def flux2_core(**more: Any) -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * 16, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16,
        **more,
    )  # fmt: skip


def flux2_klein() -> Any:
    """The base model, which has guidance."""
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=flux2_vae(),
        text_encoder=qwen3(27), tokenizer=chat_tokenizer(), transformer=flux2_core(guidance_embeds=False),
    )  # fmt: skip


def flux2_dev() -> Any:
    return diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=flux2_vae(),
        text_encoder=mistral3(30), tokenizer=chat_tokenizer(), transformer=flux2_core(guidance_embeds=True),
    )  # fmt: skip


def mistral3(layers: int) -> Any:
    text = {
        "model_type": "mistral", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": layers, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 16, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=259)
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen3(layers: int) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def chat_tokenizer() -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


PIPELINES = {
    "sd15": sd15,
    "sd21": sd21,
    "sdxl": sdxl,
    "sd3": sd3,
    "sd35": sd35,
    "flux": flux,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "chroma": chroma,
    "flux2-klein": flux2_klein,
    "flux2": flux2_dev,
    "krea2": krea2,
    "qwen-image-2.1": qwen_image21,
}

LORAS = [name for name in PIPELINES if name != "flux2"]  # its transformer and its adapter are klein's


def size(pipeline: Any) -> dict[str, int]:
    """Height and width of images."""
    side = 64 if type(pipeline).__name__ == "QwenImage21Pipeline" else SIDE
    return {"height": side, "width": side}


def build(name: str) -> Any:
    """The pipeline of that name, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = PIPELINES[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(name: str, folder: Path) -> Path:
    """The pipeline as a folder that `from_pretrained` reads."""
    build(name).save_pretrained(folder / name)
    return folder / name
