"""Human Preference Score v3: Qwen2-VL-7B and a head, trained on preferences over real and generated images."""

from functools import lru_cache
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from comfyui_pcpo.reward.base import Reward, RewardFile
from comfyui_pcpo.reward.qwen2vl import (
    IMAGE_TOKEN,
    MERGE,
    PADDING_TOKEN,
    PATCH,
    QwenBackbone,
    QwenShape,
    backbone_state,
    load_tokenizer,
    plain_text,
    resized,
)
from comfyui_pcpo.reward.weights.checkpoint import load_strict, locate, read_state

IMAGE_AREA = 256 * 28 * 28
REWARD_TOKEN = "<|Reward|>"
INSTRUCTION_FILE = Path(__file__).parent / "weights" / "hpsv3_prompt.txt"


@lru_cache(maxsize=1)
def instruction() -> str:
    """The published instruction, up to the token whose hidden state is scored; what follows cannot change it."""
    text = INSTRUCTION_FILE.read_text(encoding="utf-8")
    return text[: text.index(REWARD_TOKEN)] + REWARD_TOKEN


def chat(prompt: str, image_tokens: int) -> str:
    """Qwen2-VL's chat format of an image and the instruction."""
    image = f"<|vision_start|>{IMAGE_TOKEN * image_tokens}<|vision_end|>"
    asked = instruction().replace("{text_prompt}", plain_text(prompt))
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}{asked}"


class HPSv3Model(nn.Module):
    """Backbone and head; the head gives a mean, which is the score, and a log-deviation."""

    def __init__(self, shape: QwenShape, vocabulary: int):
        super().__init__()
        self.backbone = QwenBackbone(shape, vocabulary)
        layers = [nn.Linear(shape.width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(16, 2))

    def forward(self, tokens: Tensor, mask: Tensor, images: Tensor, image_token: int) -> Tensor:
        """Scores, ids and mask (B, L) padded on the right, uint8 images (B, H, W, 3) -> (B,)."""
        hidden = self.backbone(tokens, mask, images, image_token)
        last = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        return self.head(last.float())[:, 0]


def hpsv3_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> HPSv3Model's."""
    head = {name.replace("rm_head.", "head.", 1): x for name, x in state.items() if name.startswith("rm_head.")}
    rest = {name: x for name, x in state.items() if not name.startswith("rm_head.")}
    return head | {f"backbone.{name}": x for name, x in backbone_state(rest).items()}


class HPSv3(Reward):
    """The mean of the preference that the model predicts.

    Ma et al. 2025, HPSv3: Towards Wide-Spectrum Human Preference Score (arXiv 2508.03789)
    """

    name = "hpsv3"
    typical_range = (-2.0, 15.0)
    files = (
        RewardFile("MizzenAI/HPSv3", "HPSv3.safetensors", 16_600_000_000, "MIT"),
        RewardFile("Qwen/Qwen2-VL-7B-Instruct", "tokenizer.json", 7_031_645, "Apache-2.0"),
    )
    shape: ClassVar[QwenShape] = QwenShape()

    def build(self) -> HPSv3Model:
        from accelerate import init_empty_weights

        weights, tokenizer = (locate(self.settings, file, self.name) for file in self.files)
        self.tokenizer = load_tokenizer(tokenizer, REWARD_TOKEN)
        self.tokenizer.enable_padding(pad_id=self.tokenizer.token_to_id(PADDING_TOKEN), pad_token=PADDING_TOKEN)
        with init_empty_weights(include_buffers=False):  # 8 billion weights are read once, never drawn
            model = HPSv3Model(self.shape, self.tokenizer.get_vocab_size())
        # half precision is bfloat16, as published: activations of Qwen2-VL exceed float16
        dtype = torch.float32 if self.settings.dtype == torch.float32 else torch.bfloat16
        state = hpsv3_names(read_state(weights, self.files[0]))
        state = {name: x.to(torch.float32 if name.startswith("head.") else dtype) for name, x in state.items()}
        load_strict(model, state, weights, assign=True)
        return model

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        small = resized(images.to(self.device), IMAGE_AREA)
        count = small.shape[1] * small.shape[2] // (PATCH * MERGE) ** 2
        encoded = self.tokenizer.encode_batch([chat(prompt, count) for prompt in prompts])
        tokens, mask = (
            torch.tensor(rows, device=self.device)
            for rows in ([entry.ids for entry in encoded], [entry.attention_mask for entry in encoded])
        )
        return cast("HPSv3Model", self.model)(tokens, mask, small, self.tokenizer.token_to_id(IMAGE_TOKEN))
