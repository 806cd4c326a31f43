"""What a MODEL was loaded from."""

from pathlib import Path
from typing import Any


def file_name(model: Any) -> str:
    """Name of the file that a MODEL was loaded from, empty if its loader did not keep it."""
    return next((path.name for path in loaded_from(model)), "")


def loaded_from(model: Any) -> list[Path]:
    """The texts among what a MODEL's loader was called with, of which the first is its file."""
    return [Path(text) for text in (model.cached_patcher_init or (None, ()))[1] if isinstance(text, str)]
