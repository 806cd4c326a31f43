"""Images whose pixels have more than 8 bits."""

import numpy as np
from PIL import Image


def as_eight_bit(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """A grey image of 16 or more bits as 8 bits; `convert` alone would clip it to white.

    `file_format` is that of its file, where the image itself no longer has it. Raises ValueError for values that are
    out of the range of 8 or 16 bits, or of 0 to 1.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, np.float64)
    png = (file_format or image.format) == "PNG"  # older versions of Pillow read its 16 bits as "I"
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and png)
    most = 255 if values.max(initial=0) <= 255 and not sixteen else 65535
    most = 1 if image.mode == "F" and values.max(initial=0) <= 1 else most
    if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) <= most):
        raise ValueError(f"its values are not between 0 and {most}")
    return Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
