"""Image files: reading them, finding them in folders, and checking a path before an image is written to it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from comfyui_pcpo.image_modes import as_eight_bit

from ..config.errors import ConfigError
from ..files import require_writable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def image_files(folder: Path) -> list[Path]:
    """As `images_in`, for a reference of distances. Raises ConfigError for fewer than 2 images."""
    files = images_in(folder) if folder.is_dir() else []
    if len(files) < 2:
        count = "one image" if files else "no images"
        raise ConfigError(
            f"--reference {folder} contains {count} ({', '.join(IMAGE_SUFFIXES)}), but a distance needs at least 2, "
            "preferably thousands. Give a folder of real images."
        )
    return files


def read_image(file: Path) -> Tensor:
    """An image with its EXIF rotation applied, float (1, H, W, 3) in [0, 1]; of an animation, the first frame.

    Raises ConfigError for a broken file.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist. Give an image file or a folder of images.")
    try:
        with Image.open(file) as image:
            pixels = np.asarray(as_eight_bit(ImageOps.exif_transpose(image), image.format).convert("RGB"), np.float32)
    except Exception as error:  # Pillow raises a different error for each way in which a file can be broken
        raise ConfigError(
            f"{file} cannot be read as an image ({type(error).__name__}: {error}). "
            "Remove it, or save it again (smaller, if it is very large)."
        ) from None
    return torch.from_numpy(pixels / 255)[None]


def batches(files: list[Path], at_once: int) -> Iterator[Tensor]:
    """Read files in batches of consecutive images of one size, (b, H, W, 3) with b up to `at_once`."""
    batch: list[Tensor] = []
    for file in files:
        image = read_image(file)
        if batch and (batch[0].shape != image.shape or len(batch) == at_once):
            yield torch.cat(batch)
            batch = []
        batch.append(image)
    yield torch.cat(batch)


def check_image_path(path: Path, replace: bool = True) -> Path:
    """`path`, if an image can be written to it. Raises ConfigError before any work is done.

    With `replace` false an existing file is refused.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ConfigError(f"--out {path} does not have the suffix of an image ({', '.join(IMAGE_SUFFIXES)}).")
    return require_writable(path, "--out", replace)
