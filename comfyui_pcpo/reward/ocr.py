"""Can the text that the prompt asks for be read in the picture? Read by RapidOCR (the `ocr` extra)."""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError, Scores

Reader = Callable[[np.ndarray], str]  # uint8 (H, W, 3) RGB -> all text in it


def target_text(prompt: str) -> str | None:
    """What stands between the first double quotes, straight or curly; None where nothing does."""
    found = re.search(r'["\u201c\u201d]([^"\u201c\u201d]+)["\u201c\u201d]', prompt)
    return plain(found.group(1)) or None if found else None


def plain(text: str) -> str:
    """Text without case and spaces, in which readers differ."""
    return "".join(text.lower().split())


def levenshtein(left: str, right: str) -> int:
    """Fewest insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def text_score(target: str, read: str) -> float:
    """1 if the target was read, else 1 - min(distance, n) / n for its n characters.

    Liu et al. 2025, Flow-GRPO, section 5.1, visual text rendering
    """
    if target in read:
        return 1.0
    return 1 - min(levenshtein(target, read), len(target)) / len(target)


def rapid_reader() -> Reader:
    try:
        from rapidocr import RapidOCR  # type: ignore[import-not-found]
    except ImportError as error:
        raise RewardError("ocr needs 1 more package, rapidocr. Install it: pip install rapidocr onnxruntime") from error
    engine = RapidOCR(params={"Global.log_level": "critical"})

    def read(picture: np.ndarray) -> str:
        found = engine(np.ascontiguousarray(picture[:, :, ::-1]))  # it takes arrays as BGR
        return " ".join(getattr(found, "txts", None) or ())

    return read


class Ocr(Reward):
    """How much of the quoted text in the prompt can be read; a prompt without quotes has no score."""

    name = "ocr"
    reader: Reader | None = None

    def build(self) -> None:
        if self.reader is None:
            self.reader = rapid_reader()

    def unload(self) -> None:
        self.reader = None

    def score_batch(self, images: Tensor, prompts: list[str]) -> Scores:
        assert self.reader is not None
        read = [self.reader(picture) for picture in images.cpu().numpy()]
        targets = [target_text(prompt) for prompt in prompts]
        values = [text_score(t, plain(r)) if t else float("nan") for t, r in zip(targets, read, strict=True)]
        return Scores(torch.tensor(values), {"text": read})
