"""Encoded prompts: kept on the CPU, so that their number is not bounded by a GPU, and uploaded row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory.transfer import upload
from .base import Progress, no_progress
from .families import Inputs, TextRows

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
        positive = {k: uploaded(picked(v, index), self.device) for k, v in self.positive.items()}
        negative = self.negative and {k: uploaded(v, self.device) for k, v in self.negative.items()}
        return Encoded(positive, negative, self.device)


def picked(rows: TextRows, index: Sequence[int]) -> TextRows:
    return [rows[i] for i in index] if isinstance(rows, list) else torch.cat([rows[i : i + 1] for i in index])


def uploaded(rows: TextRows, device: torch.device) -> TextRows:
    return [upload(row, device) for row in rows] if isinstance(rows, list) else upload(rows, device)


def repeated(inputs: Inputs, count: int) -> Inputs:
    """One row of text inputs as `count` of them."""
    return {k: v * count if isinstance(v, list) else v.expand(count, *v.shape[1:]) for k, v in inputs.items()}


def both_texts(first: Inputs, second: Inputs) -> Inputs | None:
    """The rows of both; None where they would need one length and have two."""
    found: Inputs = {}
    for key, ours in first.items():
        theirs = second[key]
        if isinstance(ours, list) and isinstance(theirs, list):
            found[key] = [*ours, *theirs]
        elif isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape:
            found[key] = torch.cat([ours, theirs])
        else:
            return None
    return found


def encode_prompts(
    embed: Callable[[Sequence[str]], Inputs], prompts: Sequence[str], progress: Progress = no_progress
) -> Inputs:
    """Text inputs of any number of prompts on the CPU, some at a time."""
    parts, cpu = list[Inputs](), torch.device("cpu")
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        chunk = prompts[start : start + PROMPTS_AT_ONCE]
        parts.append({k: uploaded(v, cpu) for k, v in embed(chunk).items()})
        progress(start + len(chunk), len(prompts))
    return {key: chained([part[key] for part in parts]) for key in parts[0]}


def chained(parts: Sequence[TextRows]) -> TextRows:
    """The rows of all parts; in a tensor, shorter texts are padded with zeros."""
    lists = [rows for rows in parts if isinstance(rows, list)]
    if lists:
        return [row for rows in lists for row in rows]
    tensors = [rows for rows in parts if isinstance(rows, Tensor)]
    length = max(v.shape[1] for v in tensors)
    return torch.cat([F.pad(v, (*[0] * (2 * (v.ndim - 2)), 0, length - v.shape[1])) for v in tensors])
