"""A second reader, to check the first: it compares an image with the drawn sprites themselves and learns nothing."""

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from comfyui_pcpo.tiny.align import PIXELS, Detection, Reading
from comfyui_pcpo.tiny.captions import COLORS, KINDS, PATTERNS
from tools.tiny.draw import GROUP_WIDTHS, SINGLE, background, sprite

ZOOM = 2  # images are compared at half their size
LARGEST_ERROR = 0.17  # root mean square difference of a match, of values in [0, 1]
LARGEST_SHARE = 0.6  # of the difference that the bare background has there
OUTLIER = 0.02  # squared difference of a pixel of the rim, from which it counts as covered by a thing
RIM = 13  # pixels that no thing reaches
APART = 0.4  # of the sum of their widths: two things are never closer


@cache
def stencils(width: int) -> tuple[Tensor, Tensor]:
    """Colours (KINDS, 3, S, S) in [0, 1] and opacities (KINDS, 1, S, S) of all kinds at a width in pixels."""
    side = width // ZOOM
    tiles = []
    for kind in KINDS:
        tile, image = Image.new("RGBA", (width, width)), sprite(kind, width)
        tile.paste(image, ((width - image.width) // 2, (width - image.height) // 2))
        tiles.append(np.asarray(tile.resize((side, side), Image.Resampling.BOX), np.float32) / 255)
    found = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
    return found[:, :3], found[:, 3:]


def compare(image: Tensor, bare: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Root mean square difference of each kind at each place, and what it explains, (3, H, W) -> (KINDS, H', W') each.

    Explained is by how much less the image differs from the kind than from the bare background, summed over pixels.
    """
    colors, opacity = stencils(width)
    squares = F.conv2d(image.square().sum(0)[None, None], opacity)[0]
    products = F.conv2d(image[None], colors * opacity)[0]
    own = (colors.square() * opacity).sum((1, 2, 3))[:, None, None]
    found = (squares - 2 * products + own).clamp(min=0)
    empty = F.conv2d((image - bare).square().sum(0)[None, None], opacity)[0]
    return (found / (3 * opacity.sum((1, 2, 3))[:, None, None])).sqrt(), empty - found / LARGEST_SHARE


def read_by_templates(image: Tensor) -> Reading:
    """What an image (3, 128, 128) in [0, 1] shows, the thing that explains most first."""
    color, pattern = ground(image)
    small, bare = (F.avg_pool2d(each, ZOOM) for each in (image, pixels(color, pattern)))
    candidates: list[tuple[float, Detection]] = []
    for width in {*SINGLE.values(), *GROUP_WIDTHS.values()}:
        error, explained = compare(small, bare, width)
        for kind, y, x in ((error < LARGEST_ERROR) & (explained > 0)).nonzero().tolist():
            centre = ZOOM * x + width / 2, ZOOM * y + width / 2
            thing = Detection(KINDS[kind], *centre, width, 1 - float(error[kind, y, x]))
            candidates.append((float(explained[kind, y, x]), thing))
    kept: list[Detection] = []
    for _, new in sorted(candidates, key=lambda each: -each[0]):
        if all(np.hypot(new.x - old.x, new.y - old.y) >= APART * (old.width + new.width) for old in kept):
            kept.append(new)
    return Reading(tuple(kept), color, pattern)


def pixels(color: str, pattern: str) -> Tensor:
    """The bare background, -> (3, 128, 128) in [0, 1]."""
    return torch.from_numpy(np.array(background(color, pattern), np.float32) / 255).permute(2, 0, 1)


def ground(image: Tensor) -> tuple[str, str]:
    """Colour and pattern of the background that the rim of an image is nearest to, (3, 128, 128) in [0, 1]."""
    rim = torch.ones(PIXELS, PIXELS, dtype=torch.bool)
    rim[RIM:-RIM, RIM:-RIM] = False
    distance = {
        (c, p): float((image - pixels(c, p))[:, rim].square().clamp(max=OUTLIER).mean())
        for c in COLORS
        for p in PATTERNS
    }
    return min(distance, key=lambda each: distance[each])
