"""Encoded prompts: kept on the CPU, so that their number is not bounded by a GPU, and uploaded row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..memory.transfer import upload
from .families import Inputs

PROMPTS_AT_ONCE = 8
"""Prompts per call of the text encoders; T5's activations take 63 MB for each prompt of 512 tokens."""


@dataclass
class Encoded:
    """The denoiser's text inputs: a row per prompt, and one row of the negative prompt."""

    positive: Inputs
    negative: Inputs | None
    device: torch.device  # where the denoiser computes

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return len(next(iter(self.positive.values())))

    def rows(self, index: Sequence[int]) -> "Encoded":
        """These prompts on the denoiser's device. Slices, since a GPU waits for an index tensor."""
        positive = {k: upload(torch.cat([v[i : i + 1] for i in index]), self.device) for k, v in self.positive.items()}
        negative = self.negative and {k: upload(v, self.device) for k, v in self.negative.items()}
        return Encoded(positive, negative, self.device)


def encode_prompts(embed: Callable[[Sequence[str]], Inputs], prompts: Sequence[str]) -> Inputs:
    """Text inputs of any number of prompts on the CPU, some at a time; shorter texts are padded with zeros."""
    chunks = [prompts[i : i + PROMPTS_AT_ONCE] for i in range(0, len(prompts), PROMPTS_AT_ONCE)]
    parts = [{k: v.cpu() for k, v in embed(chunk).items()} for chunk in chunks]
    found = {}
    for key in parts[0]:
        rows = [part[key] for part in parts]
        length = max(v.shape[1] for v in rows)
        rows = [F.pad(v, (*[0] * (2 * (v.ndim - 2)), 0, length - v.shape[1])) for v in rows]
        found[key] = torch.cat(rows)
    return found
