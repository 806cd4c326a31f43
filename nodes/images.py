"""Pillow pictures as ComfyUI images."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_image(picture: Image.Image) -> Tensor:
    """A picture as IMAGE, (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).float().div(255)[None]
