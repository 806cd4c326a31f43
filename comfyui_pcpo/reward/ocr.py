"""Text rendering: how well RapidOCR (the `ocr` extra) reads the quoted text of the prompt in the image."""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError, Scores

QUOTES = '"\u201c\u201d\u201e'
Reader = Callable[[np.ndarray], str]  # uint8 (H, W, 3) RGB -> its text


def target_text(prompt: str) -> str | None:
    """The text in the first double quotes, straight, curly or German; None without any."""
    quoted = re.search(rf"[{QUOTES}]([^{QUOTES}]+)[{QUOTES}]", prompt)
    return plain(quoted.group(1)) or None if quoted else None


def plain(text: str) -> str:
    """Text without case and spaces, which OCR does not read reliably."""
    return "".join(text.lower().split())


def levenshtein(left: str, right: str) -> int:
    """Edit distance: fewest insertions, deletions and replacements from one text to the other."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def text_score(target: str, read: str) -> float:
    """1 if the target is part of the text, else 1 - min(distance, n) / n for its n characters.

    Liu et al. 2025, Flow-GRPO, section 5.1, visual text rendering
    """
    if target in read:
        return 1.0
    return 1 - min(levenshtein(target, read), len(target)) / len(target)


def rapid_reader() -> Reader:
    """RapidOCR. Raises RewardError where it is not installed."""
    try:
        from rapidocr import RapidOCR  # type: ignore[import-not-found]
    except ImportError as error:
        raise RewardError("ocr needs the package rapidocr. Install it: pip install rapidocr onnxruntime") from error
    engine = RapidOCR(params={"Global.log_level": "critical"})

    def read(image: np.ndarray) -> str:
        result = engine(np.ascontiguousarray(image[:, :, ::-1]))  # RapidOCR reads arrays as BGR
        return " ".join(getattr(result, "txts", None) or ())

    return read


class Ocr(Reward):
    """Share of the prompt's quoted text that can be read; NaN for prompts without quotes."""

    name = "ocr"
    reader: Reader | None = None

    def require_prompts(self, prompts: list[str]) -> None:
        bad = next((prompt for prompt in prompts if target_text(self.settings.plain(prompt)) is None), None)
        if bad is not None:
            raise RewardError(
                f"the prompt {bad!r} has no text in double quotes, which ocr looks for in the image. "
                'Quote it, as in: a sign that says "open"'
            )

    def build(self) -> None:
        if self.reader is None:
            self.reader = rapid_reader()

    def unload(self) -> None:
        self.reader = None

    def score_batch(self, images: Tensor, prompts: list[str]) -> Scores:
        assert self.reader is not None
        read = [self.reader(image) for image in images.cpu().numpy()]
        targets = [target_text(prompt) for prompt in prompts]
        values = [text_score(t, plain(r)) if t else float("nan") for t, r in zip(targets, read, strict=True)]
        return Scores(torch.tensor(values), {"text": read})
