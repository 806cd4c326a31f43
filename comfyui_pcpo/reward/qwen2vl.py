"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) as the backbone of a reward: image and text in, last hidden states out.

Weights are in the layout of transformers 4.45: visual.*, model.* and lm_head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from comfyui_pcpo.reward.base import RewardError
from comfyui_pcpo.reward.weights.preprocess import bicubic, normalise

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATCH, MERGE, FRAMES = 14, 2, 2
IMAGE_TOKEN, PADDING_TOKEN = "<|image_pad|>", "<|endoftext|>"


@dataclass(frozen=True)
class QwenShape:
    """Sizes of the language model and of the vision tower; the defaults are Qwen2-VL-7B's."""

    width: int = 3584
    layers: int = 28
    heads: int = 28
    key_heads: int = 4
    mlp: int = 18944
    rotary_sections: tuple[int, int, int] = (16, 24, 24)
    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16


class QwenBackbone(nn.Module):
    """Vision tower and language model without its output layer."""

    def __init__(self, shape: QwenShape, vocabulary: int):
        super().__init__()
        try:
            from transformers.models.qwen2_vl.modeling_qwen2_vl import (
                Qwen2VisionTransformerPretrainedModel,
                Qwen2VLTextModel,
            )
        except ImportError as error:
            raise RewardError(
                "hpsv3 needs transformers 4.52 or newer. Update it: pip install -U transformers"
            ) from error
        config = model_config(shape, vocabulary)
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.model = Qwen2VLTextModel(config.text_config)

    def forward(self, tokens: Tensor, mask: Tensor, images: Tensor, image_token: int) -> Tensor:
        """Last hidden states, ids and mask (B, L), uint8 images (B, H, W, 3) whose sides divide by 28 -> (B, L, D).

        Positions count tokens in one dimension, images included: the published reward was trained that way, although
        Qwen2-VL itself gives image tokens two.
        """
        embedded: Any = self.model.embed_tokens(tokens)
        dtype = embedded.dtype
        grid = torch.tensor([[1, images.shape[1] // PATCH, images.shape[2] // PATCH]] * len(images))
        output = self.visual(patches(images).to(dtype), grid_thw=grid.to(images.device))
        seen = output if isinstance(output, Tensor) else output.pooler_output  # transformers before and since 5
        embedded = embedded.masked_scatter((tokens == image_token)[..., None], seen.to(dtype))
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)
        return self.model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state


def model_config(shape: QwenShape, vocabulary: int) -> Any:
    """transformers' configuration of a Qwen2-VL of these sizes."""
    from transformers import Qwen2VLConfig

    text = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "intermediate_size": shape.mlp,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.rotary_sections)},
    }
    vision = {
        "embed_dim": shape.vision_width,
        "depth": shape.vision_layers,
        "num_heads": shape.vision_heads,
        "hidden_size": shape.width,
    }
    return Qwen2VLConfig(text_config=text, vision_config=vision)


def backbone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the backbone in this module's names, also from the layout of transformers 4.52 and newer."""
    renamed = {name.replace("model.visual.", "visual.", 1): value for name, value in state.items()}
    renamed = {name.replace("model.language_model.", "model.", 1): value for name, value in renamed.items()}
    return {name: value for name, value in renamed.items() if not name.startswith("lm_head.")}


def grid_size(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Height and width of about `pixels` pixels in all, multiples of 28 in nearly the image's aspect ratio."""
    unit = PATCH * MERGE
    rounded = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
    if math.prod(rounded) == pixels:
        return rounded
    up = math.prod(rounded) < pixels
    # two ways to write one scale: the reference's, whose rounding decides sides that are nearly multiples
    scale = math.sqrt(pixels / (height * width)) if up else math.sqrt(height * width / pixels)
    sides = (height * scale, width * scale) if up else (height / scale, width / scale)
    whole = math.ceil if up else math.floor
    return whole(sides[0] / unit) * unit, whole(sides[1] / unit) * unit


def resized(images: Tensor, pixels: int) -> Tensor:
    """Images of about `pixels` pixels each, uint8 (B, H, W, 3) -> uint8 (B, h, w, 3)."""
    height, width = grid_size(images.shape[1], images.shape[2], pixels)
    if min(height, width) == 0:
        raise RewardError(
            f"The images have {images.shape[1]} x {images.shape[2]} pixels, which is too narrow for Qwen2-VL. Score "
            "images with an aspect ratio below 200."
        )
    return bicubic(images, height, width)


def patches(images: Tensor) -> Tensor:
    """Patches of still images, uint8 (B, H, W, 3) -> (B * H / 14 * W / 14, 1176): each is two equal frames."""
    pixels = normalise(images.permute(0, 3, 1, 2).float() / 255)
    # (B, C, H, W) -> (B, C, rows, merged, patch, columns, merged, patch) -> rows of (C, frames, patch, patch)
    split = pixels.unflatten(3, (-1, MERGE, PATCH)).unflatten(2, (-1, MERGE, PATCH)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return split.unsqueeze(6).expand(*split.shape[:6], FRAMES, PATCH, PATCH).flatten(5).flatten(0, 4)


def load_tokenizer(path: Path, added: str) -> "Tokenizer":
    """The tokenizer of a tokenizer.json, with one special token added. Raises RewardError for another file."""
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise RewardError(f"{path} cannot be read as a tokenizer ({error}). Download it again.") from error
    missing = [token for token in (IMAGE_TOKEN, PADDING_TOKEN) if tokenizer.token_to_id(token) is None]
    if missing:
        raise RewardError(f"{path} lacks the token {missing[0]}: it is another model's. Download it again.")
    tokenizer.add_special_tokens([AddedToken(added, normalized=False, special=True)])
    return tokenizer


def plain_text(prompt: str) -> str:
    """A prompt that cannot contain special tokens, which look like <|image_pad|>."""
    return prompt.replace("<|", "< |")
