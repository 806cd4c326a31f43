"""CLIP networks in the weight layouts of open_clip and of transformers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.reward.base import RewardFile, RewardSettings
from comfyui_pcpo.reward.weights.checkpoint import load_strict, locate, read_state

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from transformers import CLIPModel

CONTEXT, VOCABULARY = 77, 49408


@dataclass(frozen=True)
class ClipShape:
    """Sizes of a CLIP with a vision transformer for images of 224 x 224."""

    embed: int
    width: int
    layers: int
    head_width: int
    patch: int
    text_width: int
    text_layers: int
    text_heads: int
    quick_gelu: bool = False


VIT_H_14 = ClipShape(1024, 1280, 32, 80, 14, 1024, 24, 16)
VIT_L_14 = ClipShape(768, 1024, 24, 64, 14, 768, 12, 12, quick_gelu=True)  # OpenAI's
CLIP_FILE = RewardFile("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors", 1_710_000_000, "MIT")
"""The weights of VIT_L_14."""


def open_clip_model(shape: ClipShape) -> "CLIP":
    """open_clip's CLIP, its weights random."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=shape.layers, width=shape.width, head_width=shape.head_width, patch_size=shape.patch, image_size=224
    )
    text = CLIPTextCfg(
        context_length=CONTEXT,
        vocab_size=VOCABULARY,
        width=shape.text_width,
        heads=shape.text_heads,
        layers=shape.text_layers,
    )
    return CLIP(shape.embed, vision, text, quick_gelu=shape.quick_gelu)


def vision_tower(shape: ClipShape, file: RewardFile, settings: RewardSettings, reward: str) -> nn.Module:
    """The vision tower of a CLIP in open_clip's layout: normalised pixels (B, 3, 224, 224) -> (B, shape.embed).

    Raises RewardError, which names the reward that is to be downloaded, for a missing or damaged file.
    """
    path, visual = locate(settings, file, reward), open_clip_model(shape).visual
    state = read_state(path, file)
    load_strict(visual, {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}, path)
    return visual.to(settings.dtype)


def transformers_clip(shape: ClipShape) -> "CLIPModel":
    """transformers' CLIP; eos_token_id 2, as in published CLIP configs, means pooling at the largest token id."""
    from transformers import CLIPConfig, CLIPModel

    act = "quick_gelu" if shape.quick_gelu else "gelu"
    text = {
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_heads,
        "hidden_act": act,
        "projection_dim": shape.embed,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.width // shape.head_width,
        "hidden_act": act,
        "patch_size": shape.patch,
        "image_size": 224,
        "projection_dim": shape.embed,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.embed))


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine in float32, independent of the towers' precision, (B, D), (B, D) -> (B,)."""
    return (F.normalize(left.float(), dim=-1) * F.normalize(right.float(), dim=-1)).sum(-1)
