"""Cleanness of a drawing, predicted by an embedded tiny network trained on drawings and degraded copies."""

from torch import Tensor

from comfyui_pcpo.reward.alignment import encoder_input
from comfyui_pcpo.reward.base import Reward
from comfyui_pcpo.tiny.pipelines import MODELS
from comfyui_pcpo.tiny.polish import PolishNet, load_polish


class Polish(Reward):
    """Learned cleanness of drawings; the counterpart of aesthetic predictors for the embedded models."""

    name = "polish"
    needs_prompt = False
    typical_range = (0.0, 1.1)

    def build(self) -> PolishNet:
        return load_polish(MODELS / "emoji-polish")

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert isinstance(self.model, PolishNet)
        return self.model(encoder_input(images.to(self.device)))
