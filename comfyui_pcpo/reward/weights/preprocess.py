"""Preprocessing of each network, exactly as its authors did it: one pixel of difference changes the scores.

Images are uint8 (B, H, W, 3); results are float (B, 3, 224, 224), normalised with CLIP's mean and std.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIDE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its std, (B, 3, H, W) in [0, 1] -> (B, 3, H, W)."""
    mean, std = pixels.new_tensor(MEAN).view(3, 1, 1), pixels.new_tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std


def pil_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bicubic resize, uint8 (B, H, W, 3) -> uint8 (B, height, width, 3)."""
    resized = [Image.fromarray(i).resize((width, height), Image.Resampling.BICUBIC) for i in images.cpu().numpy()]
    return torch.from_numpy(np.stack([np.asarray(i) for i in resized])).to(images.device)


def two_pass_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Pillow's resize on any device, equal to one grey level: width, round to 8 bit, then height and round again."""
    pixels = images.permute(0, 3, 1, 2).float()
    for size in ((images.shape[1], width), (height, width)):
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Pillow on the CPU, `two_pass_bicubic` on other devices, uint8 (B, H, W, 3) -> (B, height, width, 3)."""
    resize = pil_bicubic if images.device.type == "cpu" else two_pass_bicubic
    return resize(images, height, width)


def shortest_side(images: Tensor) -> Tensor:
    """Shorter side to 224, the longer one int(224 * long / short), uint8 (B, H, W, 3) -> (B, h, w, 3)."""
    height, width = images.shape[1:3]
    longer = int(SIDE * max(height, width) / min(height, width))
    return bicubic(images, longer, SIDE) if height > width else bicubic(images, SIDE, longer)


def center_crop(images: Tensor, top: int, left: int) -> Tensor:
    """A normalised 224 x 224 crop, uint8 (B, h, w, 3) -> (B, 3, 224, 224)."""
    crop = images[:, top : top + SIDE, left : left + SIDE]
    return normalise(crop.permute(0, 3, 1, 2).float() / 255)


def crop_floor(images: Tensor) -> Tensor:
    """As transformers' CLIP processor: odd margins are rounded down, uint8 (B, H, W, 3) -> (B, 3, 224, 224)."""
    images = shortest_side(images)
    return center_crop(images, (images.shape[1] - SIDE) // 2, (images.shape[2] - SIDE) // 2)


def crop_round(images: Tensor) -> Tensor:
    """As torchvision's CenterCrop: odd margins are rounded, halves to even, uint8 (B, H, W, 3) -> (B, 3, 224, 224)."""
    images = shortest_side(images)
    return center_crop(images, round((images.shape[1] - SIDE) / 2), round((images.shape[2] - SIDE) / 2))


def pad_square(images: Tensor) -> Tensor:
    """HPSv2: longer side to 224 in float, black bars, then normalise, uint8 (B, H, W, 3) -> (B, 3, 224, 224)."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    scale = SIDE / max(pixels.shape[-2:])
    size = tuple(max(1, round(side * scale)) for side in pixels.shape[-2:])
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    down, right = SIDE - size[0], SIDE - size[1]
    return normalise(F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2)))
