"""Images on the wire: base64 PNG, with their size checked before any pixels are decoded."""

import base64
import binascii
import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from comfyui_pcpo.image_modes import as_eight_bit
from comfyui_pcpo.reward.base import RewardError


def encode_png(image: np.ndarray) -> str:
    """Base64 PNG of an image, uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


@contextmanager
def opened_png(text: str, max_pixels: int) -> Iterator[Image.Image]:
    """A base64 PNG with its size checked from the header, before any pixels are decoded."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise RewardError(
                    f"An image has {pixels} pixels, but at most {max_pixels} are accepted. Send a smaller one."
                )
            yield image
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError("An image cannot be read. Send each image as base64 of a PNG file.") from error


def png_size(text: str, max_pixels: int) -> tuple[int, int]:
    """Height and width of a base64 PNG, from its header."""
    with opened_png(text, max_pixels) as image:
        return image.height, image.width


def decode_png(text: str, max_pixels: int) -> np.ndarray:
    """The image in a base64 PNG, uint8 (H, W, 3)."""
    with opened_png(text, max_pixels) as image:
        return np.array(as_eight_bit(image).convert("RGBA").convert("RGB"))
