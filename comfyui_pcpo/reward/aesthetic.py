"""LAION's aesthetic predictor: the rating that people would give an image, from 1 to 10."""

from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.reward.base import Reward, RewardFile
from comfyui_pcpo.reward.clip import CLIP_FILE, VIT_L_14, ClipShape, vision_tower
from comfyui_pcpo.reward.weights.checkpoint import load_strict, locate, read_state
from comfyui_pcpo.reward.weights.preprocess import crop_round


def linear_head(width: int) -> nn.Sequential:
    """Five linear layers without activations; dropout layers keep the checkpoint's numbering, (B, D) -> (B, 1)."""
    dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    layers: list[nn.Module] = []
    for (before, after), dropout in zip(((width, 1024), (1024, 128), (128, 64)), dropouts, strict=True):
        layers += [nn.Linear(before, after), dropout]
    return nn.Sequential(*layers, nn.Linear(64, 16), nn.Linear(16, 1))


class AestheticModel(nn.Module):
    """CLIP's vision tower and a head on its normalised embedding."""

    def __init__(self, visual: nn.Module, head: nn.Module):
        super().__init__()
        self.visual, self.head = visual, head

    def forward(self, pixels: Tensor) -> Tensor:
        """Score of normalised images, (B, 3, 224, 224) -> (B,)."""
        return self.head(F.normalize(self.visual(pixels).float(), dim=-1))[:, 0]


class Aesthetic(Reward):
    """LAION-Aesthetics V2 (Schuhmann 2022), the reward of DDPO and of most later papers."""

    name = "aesthetic"
    needs_prompt = False
    typical_range = (4.5, 7.0)
    files = (
        RewardFile("trojblue/clip-aesthetics", "sac+logos+ava1-l14-linearMSE.pth", 3_714_759, "Apache-2.0"),
        CLIP_FILE,
    )
    shape: ClassVar[ClipShape] = VIT_L_14

    def build(self) -> AestheticModel:
        head_path = locate(self.settings, self.files[0], self.name)
        head = linear_head(self.shape.embed)
        state = read_state(head_path, self.files[0])
        load_strict(head, {name.removeprefix("layers."): value for name, value in state.items()}, head_path)
        return AestheticModel(vision_tower(self.shape, self.files[1], self.settings, self.name), head.float())

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return cast("AestheticModel", self.model)(crop_round(images.to(self.device)).to(self.settings.dtype))
