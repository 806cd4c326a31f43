"""How much an image differs from the others of its group. Added to another reward, it holds off mode collapse."""

from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.reward.alignment import encoder_input
from comfyui_pcpo.reward.clip import CLIP_FILE, VIT_L_14, ClipShape, vision_tower
from comfyui_pcpo.reward.group import ALONE, GroupReward
from comfyui_pcpo.reward.weights.preprocess import crop_round
from comfyui_pcpo.tiny.align import load_image_encoder

if TYPE_CHECKING:
    from comfyui_pcpo.tiny.align import AlignImageEncoder


def mean_distance(features: Tensor) -> Tensor:
    """Mean cosine distance of each row to the other rows, (G, D) -> (G,); NaN for a row without others.

    d_i = 1 - sum_{j != i} <f_i, f_j> / (G - 1)  with unit vectors f;  its mean is the mean pairwise distance
    """
    unit = F.normalize(features.double(), dim=-1)
    cosine = unit @ unit.T
    others = cosine.sum(1) - cosine.diagonal()
    return 1 - others / (len(features) - 1) if len(features) > 1 else torch.full((len(features),), torch.nan)


class DiversityOf(GroupReward):
    """Mean cosine distance to the other images of the group, in the features of a network."""

    needs_prompt = False

    def embed(self, images: Tensor) -> Tensor:
        """Features of 8-bit images, uint8 (B, H, W, 3) -> (B, D)."""
        raise NotImplementedError(f"{type(self).__name__} does not define embed. Define it: one row per image.")

    def score_group(self, images: Tensor, prompt: str) -> Tensor:
        if len(images) == 1:
            self.failure = ALONE
        parts = images.split(self.settings.images_at_once)
        return mean_distance(torch.cat([self.embed(part.to(self.device)).float() for part in parts]))


class Diversity(DiversityOf):
    """In the image embedding of CLIP ViT-L/14."""

    name = "diversity"
    typical_range = (0.05, 0.5)
    files = (CLIP_FILE,)
    shape: ClassVar[ClipShape] = VIT_L_14

    def build(self) -> nn.Module:
        return vision_tower(self.shape, self.files[0], self.settings, self.name)

    def embed(self, images: Tensor) -> Tensor:
        return cast("nn.Module", self.model)(crop_round(images).to(self.settings.dtype))


class TinyDiversity(DiversityOf):
    """In the features of the embedded encoder; only meaningful for images of the embedded models."""

    name = "tiny_diversity"
    typical_range = (0.05, 0.9)

    def build(self) -> nn.Module:
        return load_image_encoder()

    def embed(self, images: Tensor) -> Tensor:
        return cast("AlignImageEncoder", self.model).encode(encoder_input(images))
