"""File names that are not taken yet."""

import itertools
from pathlib import Path


def free_name(folder: Path, name: str, suffix: str = "") -> str:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist in `folder`."""
    names = itertools.chain([name + suffix], (f"{name}-{n}{suffix}" for n in itertools.count(2)))
    return next(candidate for candidate in names if not (folder / candidate).exists())
