"""Scenes as numbers: what text encoder and reader learn to state, and which caption fits which image."""

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.tiny.captions import COLORS, KINDS, MOST, PATTERNS, RELATIONS, SIZES, Scene

UNSAID = 0  # index 0 of every attribute; values start at 1
SLOTS = {
    "first": len(KINDS) + 1,
    "first_count": MOST + 1,
    "second": len(KINDS) + 1,
    "second_count": MOST + 1,
    "relation": len(RELATIONS) + 1,
    "size": len(SIZES) + 1,
    "color": len(COLORS) + 1,
    "pattern": len(PATTERNS) + 1,
}


def _index(value: str | None, table: tuple[str, ...]) -> int:
    return UNSAID if value is None else 1 + table.index(value)


def slots(scenes: list[Scene]) -> dict[str, Tensor]:
    """Attributes in the order of the words, 0 where unsaid; each (N,)."""
    rows = []
    for scene in scenes:
        things = [(_index(thing.kind, KINDS), thing.count) for thing in scene.things]
        (first, first_count), (second, second_count) = (*things, (0, 0))[:2]
        attributes = (_index(scene.relation, RELATIONS), _index(scene.things[0].size, SIZES))
        ground = (_index(scene.color, tuple(COLORS)), _index(scene.pattern, PATTERNS))
        rows.append((first, first_count, second, second_count, *attributes, *ground))
    return dict(zip(SLOTS, torch.tensor(rows).unbind(1), strict=True))


def counts(scenes: list[Scene]) -> Tensor:
    """How many of each kind, (N, KINDS)."""
    table = np.zeros((len(scenes), len(KINDS)), np.int64)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            table[row, KINDS.index(thing.kind)] = thing.count
    return torch.from_numpy(table)


def matches(images: list[Scene], captions: list[Scene]) -> Tensor:
    """Whether everything said in a caption is true of an image, (B,) x (K,) -> (B, K) bool."""
    shown, said = slots(images), slots(captions)
    fits = (counts(images)[:, None] == counts(captions)[None]).all(-1)
    for key in ("size", "color", "pattern", "relation"):
        fits &= (said[key][None] == UNSAID) | (shown[key][:, None] == said[key][None])
    ordered = shown["first"][:, None] == said["first"][None]
    return fits & (ordered | (said["relation"][None] == UNSAID))
