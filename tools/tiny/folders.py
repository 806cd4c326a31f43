"""Where the finished models are stored."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """The folder of all embedded models and its parts."""

    models: Path

    @property
    def shared(self) -> Path:
        """Tokenizer, text encoder and autoencoder, used by both generators."""
        return self.models / "shared"
