"""Pillow images as ComfyUI images."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_comfy_image(image: Image.Image) -> Tensor:
    """A Pillow image as ComfyUI's IMAGE, (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).float().div(255)[None]
