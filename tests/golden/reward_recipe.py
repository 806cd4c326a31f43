"""Deterministic weights and images for the reward tests, and the scores that reference implementations gave them."""

import json
import math
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent
IMAGE_SUFFIXES = {  # name -> height, width, seed
    "sq512": (512, 512, 1),
    "sq1024": (1024, 1024, 2),
    "land300x451": (300, 451, 3),
    "port337x225": (337, 225, 4),
    "port512x337": (512, 337, 5),
    "small96": (96, 96, 6),
    "exact224": (224, 224, 7),
}
PROMPTS = {
    "sq512": "a photo of an astronaut riding a horse",
    "sq1024": "a cup of coffee on a wooden table, 8k, highly detailed",
    "land300x451": "a cat",
    "port337x225": "an astronaut\u2019s glove with \u201cNASA 2049\u201d &amp; caf\u00e9 \n ok",
    "port512x337": "word " * 100,
    "small96": "",
    "exact224": "A RED Circle, on a blue background!!",
}
POSITIONS = ("pos_embed", "cls_token", "position_embedding.weight", "positional_embedding")


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def weight(name: str, shape: list[int]) -> Tensor:
    """The tensor that belongs to a checkpoint key: seeded by the key's name, scaled by its kind."""
    if name.endswith("logit_scale"):
        return torch.full(shape, math.log(100.0))
    seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
    x = torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32))
    if len(shape) >= 2 and not name.endswith(POSITIONS):
        return x / np.float32(math.sqrt(math.prod(shape[1:])))
    is_norm = name.endswith("weight") and any(kind in name.lower() for kind in ("ln_", "norm", "layrnorm"))
    return 1 + 0.1 * x if len(shape) == 1 and is_norm else 0.1 * x


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: weight(name, shape) for name, shape in shapes.items()}


QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def qwen_tokenizer() -> Any:
    """Qwen2's tokenizer with the 256 bytes as its vocabulary, no merges, and the special tokens that matter here."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_TOKENS])
    return tokenizer


def array(name: str) -> np.ndarray:
    """Waves, rectangles and noise, uint8 (H, W, 3): sharp edges, so that details of resizing matter."""
    height, width, seed = IMAGE_SUFFIXES[name]
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 127 * np.sin(x * (0.02 + 0.01 * c) + y * 0.013 * (c + 1) + seed) for c in range(3)]
    canvas = np.stack(channels, -1)
    for _ in range(12):
        top, left = random.randint(0, height), random.randint(0, width)
        bottom = min(height, top + random.randint(4, height // 2))
        right = min(width, left + random.randint(4, width // 2))
        canvas[top:bottom, left:right] = random.randint(0, 256, 3)
    canvas = canvas + random.randint(-12, 13, canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


@lru_cache(maxsize=len(IMAGE_SUFFIXES))
def image(name: str) -> Tensor:
    """The image as ComfyUI passes it, float (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(array(name))[None].float() / 255


def scores(reward: Any, names: Iterable[str] = IMAGE_SUFFIXES) -> dict[str, float]:
    """The reward's score of golden images with their prompts."""
    return {name: reward.score(image(name), [PROMPTS[name]]).item() for name in names}
