"""ImageReward v1.0: BLIP with cross-attention from prompt to image, and a head that predicts human ratings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from comfyui_pcpo.reward.aesthetic import linear_head
from comfyui_pcpo.reward.base import Reward, RewardFile
from comfyui_pcpo.reward.weights.checkpoint import drop_suffixes, load_strict, locate, read_state
from comfyui_pcpo.reward.weights.preprocess import crop_round
from comfyui_pcpo.reward.weights.tokens import bert_tokens

if TYPE_CHECKING:
    from transformers import BlipTextModel, BlipVisionModel

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores on the training set
UNUSED = (".position_ids", "vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias")
RENAMES = (
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^(vision\..*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
)


@dataclass(frozen=True)
class BlipShape:
    """Sizes of BLIP's vision tower (16-pixel patches, 224 x 224) and of its text tower."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12


def new_name(name: str) -> str:
    """A weight's name in ImageReward.pt -> its name in `ImageRewardModel`."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward.pt's state dict in our names, without the parts that scoring does not use."""
    return {new_name(name): tensor for name, tensor in drop_suffixes(state, UNUSED).items()}


class ImageRewardModel(nn.Module):
    """Vision tower, text tower with cross-attention to the image, and a head on its first token."""

    def __init__(self, vision: "BlipVisionModel", text: "BlipTextModel", head: nn.Module):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Standardised score, (B, 3, 224, 224), (B, 35), (B, 35) -> (B,)."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
        ).last_hidden_state
        return (self.head(read[:, 0].float())[:, 0] - MEAN) / STD


def imagereward_model(shape: BlipShape) -> ImageRewardModel:
    """The network without weights. Vision's layer norms use eps 1e-6: transformers' default costs up to 6.5e-4."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=shape.text_width,
        encoder_hidden_size=shape.width,
        intermediate_size=4 * shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        is_decoder=True,  # gives the layers cross-attention; forward's own is_decoder stays False: no causal mask
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
    )
    towers = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    return ImageRewardModel(*towers, linear_head(shape.text_width))


class ImageReward(Reward):
    """Standardised output of the head.

    Xu et al. 2023, ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation
    """

    name = "imagereward"
    typical_range = (-2.3, 2.0)
    files = (RewardFile("THUDM/ImageReward", "ImageReward.pt", 1_790_000_000, "Apache-2.0"),)
    shape: ClassVar[BlipShape] = BlipShape()

    def build(self) -> ImageRewardModel:
        path = locate(self.settings, self.files[0], self.name)
        model = imagereward_model(self.shape)
        load_strict(model, renamed(read_state(path, self.files[0])), path)
        model.to(self.settings.dtype).head.float()
        return model

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens, mask = bert_tokens(prompts)
        pixels = crop_round(images.to(self.device)).to(self.settings.dtype)
        return cast("ImageRewardModel", self.model)(pixels, tokens.to(self.device), mask.to(self.device))
