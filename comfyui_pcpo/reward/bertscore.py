"""DDPO's prompt alignment: BERTScore between the prompt and a VLM's description of the image."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.reward.base import RewardFile, RewardSettings, Scores
from comfyui_pcpo.reward.service.endpoint import EndpointReward, Vlm
from comfyui_pcpo.reward.weights.checkpoint import locate

QUESTION = "Answer concisely: what is going on in this image?"
LAYER = 40
HUB_ID = "microsoft/deberta-xlarge-mnli"


@dataclass(frozen=True)
class Embedded:
    """Unit vectors of a text's tokens (L, D), and a mask of the words (L,) that excludes special tokens."""

    vectors: Tensor
    words: Tensor


def recall(reference: Embedded, candidate: Embedded) -> float:
    """Mean over the reference's words of the best cosine with any token of the candidate.

    Zhang et al. 2020, BERTScore, section 3, R_BERT without idf and without rescaling
    """
    best = (reference.vectors @ candidate.vectors.T).max(1).values
    return best[reference.words].mean().item()


class BertScore(EndpointReward):
    """BERTScore recall of "The image contains {prompt}" in the model's description.

    Black et al. 2023, Training Diffusion Models with Reinforcement Learning, section 5.2
    """

    name = "bertscore"
    typical_range = (0.5, 0.9)
    files = (
        RewardFile(HUB_ID, "pytorch_model.bin", 3_040_000_000, "MIT"),
        RewardFile(HUB_ID, "config.json", 792, "MIT"),
        RewardFile(HUB_ID, "tokenizer_config.json", 52, "MIT"),
        RewardFile(HUB_ID, "vocab.json", 899_000, "MIT"),
        RewardFile(HUB_ID, "merges.txt", 456_000, "MIT"),
    )
    elsewhere = False  # its DeBERTa takes the GPU that samples
    layer = LAYER

    def __init__(self, settings: RewardSettings | None = None, vlm: Vlm | None = None):
        super().__init__(settings, vlm)
        self.tokenizer: Any = None

    def build(self) -> nn.Module:
        """DeBERTa from its folder of config, tokenizer and weights; layers above the 40th are removed."""
        from transformers import AutoModel, AutoTokenizer

        paths = [locate(self.settings, file, self.name) for file in self.files]
        folder = paths[0].parent
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).to(self.settings.dtype)
        model.encoder.layer = model.encoder.layer[: self.layer]
        return cast("nn.Module", model)

    def embed(self, text: str) -> Embedded:
        assert self.model is not None
        entry = self.tokenizer(
            text.strip(), truncation=True, max_length=512, return_tensors="pt", return_special_tokens_mask=True
        )
        mask = entry.pop("special_tokens_mask")[0]
        hidden = self.model(**entry.to(self.device)).last_hidden_state[0]
        return Embedded(F.normalize(hidden.float(), dim=-1), (mask == 0).to(self.device))

    def score_image(self, image: np.ndarray, prompt: str) -> tuple[float, str]:
        caption = self.chat(image, QUESTION, {"max_tokens": 64})["text"]
        if not caption.strip():
            self.failure = "the model described the image with an empty text"
            return float("nan"), caption
        return recall(self.embed(f"The image contains {prompt}"), self.embed(caption)), caption

    def unload(self) -> None:
        super().unload()
        self.tokenizer = None

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor | Scores:
        with torch.no_grad():
            return super().score_batch(images, prompts)
