"""How clean a drawing looks, judged by an embedded tiny network that has seen drawings and spoiled copies of them."""

from torch import Tensor

from comfyui_pcpo.reward.alignment import encoder_input
from comfyui_pcpo.reward.base import Reward
from comfyui_pcpo.tiny.pipelines import MODELS
from comfyui_pcpo.tiny.polish import PolishNet, load_polish


class Polish(Reward):
    """A learned taste for clean drawings: what the aesthetic predictors are to photographs, for the embedded models."""

    name = "polish"
    needs_prompt = False
    typical_range = (0.0, 1.1)
    memory = 1_000_000

    def build(self) -> PolishNet:
        return load_polish(MODELS / "emoji-polish")

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert isinstance(self.model, PolishNet)
        return self.model(encoder_input(images.to(self.device)))
