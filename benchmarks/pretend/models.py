"""Full-size pipelines without contents, text encoders included; sizes are those of the published configurations."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from trainer.policy.skeletons import CLIP_G, CLIP_L

from ..speed import full_size_models as models

QWEN: models.Sizes = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
KLEIN_4B: models.Sizes = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3 * 2560,
    "guidance_embeds": False,
}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
QWEN_SHIFT = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}


def whole_clip(sizes: dict[str, Any], projection: bool = False) -> Any:
    given = {k: v for k, v in sizes.items() if k not in ("architectures", "model_type")}
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return models.filled(lambda: kind(transformers.CLIPTextConfig(**given)), True)


def whole_t5() -> Any:
    """The encoder of T5-XXL."""
    library: Any = transformers
    config = library.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, tie_word_embeddings=False,
    )  # fmt: skip
    return models.filled(lambda: transformers.T5EncoderModel(config), True)


def whole_qwen() -> Any:
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", **QWEN_SHIFT
        ),
        vae=models.filled(
            lambda: diffusers.AutoencoderKLQwenImage(latents_mean=[0.0] * 16, latents_std=[1.0] * 16),
            True,
            torch.float32,
        ),
        text_encoder=models.filled(lambda: kind(config), True),
        tokenizer=byte_tokenizer(),
        transformer=models.filled(lambda: diffusers.QwenImageTransformer2DModel(**QWEN), True),
    )


def whole_z_image() -> Any:
    """The transformer's defaults are the published sizes."""
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=models.vae(False, True, latent_channels=16, shift_factor=0.1159),
        text_encoder=models.filled(lambda: transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3_4B)), True),
        tokenizer=byte_tokenizer(),
        transformer=models.filled(lambda: diffusers.ZImageTransformer2DModel(), True),
    )


def whole_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=models.filled(lambda: diffusers.AutoencoderKLFlux2(), True, torch.float32),
        text_encoder=models.filled(lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3_4B)), True),
        tokenizer=byte_tokenizer(),
        transformer=models.filled(lambda: diffusers.Flux2Transformer2DModel(**KLEIN_4B), True),
        is_distilled=True,
    )


def whole_chroma() -> Any:
    """The transformer's defaults are the published sizes."""
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **models.FLUX_SHIFT),
        vae=models.vae(False, True, latent_channels=16, shift_factor=0.1159),
        text_encoder=whole_t5(),
        tokenizer=models.t5_tokenizer(),
        transformer=models.filled(lambda: diffusers.ChromaTransformer2DModel(), True),
    )


def byte_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    return transformers.Qwen2Tokenizer(vocab={**vocab, "<|endoftext|>": 256}, merges=[], chat_template=CHAT)


def with_text(kind: str, **encoders: Callable[[], Any]) -> Callable[[], Any]:
    """A pipeline of `full_size_models` with text encoders of full size."""

    def build() -> Any:
        pipeline = models.PIPELINES[kind](False, True)
        pipeline.register_modules(**{name: make() for name, make in encoders.items()})
        return pipeline

    return build


WHOLE_PIPELINES: dict[str, Callable[[], Any]] = {
    "sd15": with_text("sd15", text_encoder=lambda: whole_clip(CLIP_L)),
    "sdxl": with_text("sdxl", text_encoder=lambda: whole_clip(CLIP_L), text_encoder_2=lambda: whole_clip(CLIP_G, True)),
    "sd35m": with_text(
        "sd35m",
        text_encoder=lambda: whole_clip(CLIP_L, True),
        text_encoder_2=lambda: whole_clip(CLIP_G, True),
        text_encoder_3=whole_t5,
    ),
    "flux": with_text("flux", text_encoder=lambda: whole_clip(CLIP_L), text_encoder_2=whole_t5),
    "qwen": whole_qwen,
    "z-image": whole_z_image,
    "klein": whole_klein,
    "chroma": whole_chroma,
}
