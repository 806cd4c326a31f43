"""What tells models and rewards from others of the same name: their weights or their code, in short."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from comfyui_pcpo.reward.user import code_of


def sampled_digest(path: Path, blocks: int = 16, size: int = 1 << 16) -> str:
    """A fingerprint of a large file from its size and evenly spaced blocks; it reads at most 1 MiB."""
    length = path.stat().st_size
    found = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        for n in range(blocks):
            file.seek(max(0, length - size) * n // (blocks - 1))
            found.update(file.read(size))
    return found.hexdigest()


def fingerprint(model: Path) -> str | None:
    """A sampled digest of a local model's weights; None for an embedded model or one of the hub."""
    files = [model] if model.is_file() else sorted(model.rglob("*.safetensors")) if model.is_dir() else []
    return " ".join(sampled_digest(file)[:16] for file in files) or None


def reward_fingerprints(names: Iterable[str]) -> dict[str, str | None]:
    """The fingerprint of each reward that is a file of weights or of code, by its name; absent ones are left out."""
    files = {name: Path(name) if name.endswith(".safetensors") else code_of(name) for name in names}
    return {name: fingerprint(file) for name, file in files.items() if file is not None and file.is_file()}
