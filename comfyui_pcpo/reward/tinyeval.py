"""Prompt following on the embedded models: an image is read, and compared with what its prompt asks for."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from comfyui_pcpo.reward.alignment import encoder_input
from comfyui_pcpo.reward.base import Reward, RewardError
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.tinyeval import known_scene, partial_score, read_and_parse

if TYPE_CHECKING:
    from comfyui_pcpo.tiny.align import AlignImageEncoder


class TinyEval(Reward):
    """Share of what the prompt asks for that emoji-align finds in the image; 1 if all is right.

    Kinds, numbers, relation, size, background and pattern count equally, those that the prompt states; wrong numbers
    count in part. Only for prompts of the embedded models.
    """

    name = "tinyeval"
    typical_range = (0.0, 1.0)

    def build(self) -> nn.Module:
        return load_image_encoder()

    def require_prompts(self, prompts: list[str]) -> None:
        try:
            for prompt in prompts:
                known_scene(self.settings.plain(prompt))
        except ValueError as error:
            raise RewardError(str(error)) from None

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        encoder = cast("AlignImageEncoder", self.model)
        try:
            read = read_and_parse(encoder, encoder_input(images.to(self.device)), prompts)
        except ValueError as error:  # a prompt from outside the embedded models' domain
            raise RewardError(str(error)) from None
        return torch.tensor([partial_score(reading, scene) for reading, scene in read])
