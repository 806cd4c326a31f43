"""The optional package bitsandbytes."""

from typing import Any

from ..config.schema import ConfigError


def bitsandbytes_for(purpose: str) -> Any:
    """The package. Raises ConfigError, with `purpose` in its message, if it is not installed."""
    try:
        import bitsandbytes as package  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{purpose} needs the package bitsandbytes, which is not installed. `pip install bitsandbytes`, or choose "
            "another setting."
        ) from None
    return package
