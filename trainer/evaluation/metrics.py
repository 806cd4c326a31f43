"""What `evaluate` measures of one set of pictures: rewards, distance to a reference, variety."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from comfyui_pcpo.metrics.errors import MetricError
from comfyui_pcpo.metrics.features import extract, load_dino, load_inception, load_lpips, load_tiny_features
from comfyui_pcpo.metrics.frechet import diversity, frechet, inception_score
from comfyui_pcpo.metrics.lpips import Lpips
from comfyui_pcpo.reward import Reward

from ..config.schema import ConfigError
from ..loop.scoring import score

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LOWER = ("tiny FD", "FID", "FD-DINOv2")


@dataclass(frozen=True)
class Files:
    """Where the feature networks lie; those that are None are not used."""

    inception: Path | None = None
    dino: Path | None = None
    lpips: Path | None = None


@dataclass(frozen=True)
class Networks:
    """The feature networks in use, by the name of their distance, and LPIPS."""

    by_name: dict[str, torch.nn.Module]
    lpips: Lpips | None = None


def load_networks(tiny: bool, files: Files, device: str) -> Networks:
    """Read what was named; the tiny encoder only where it knows the pictures' world."""
    found: dict[str, torch.nn.Module] = {"tiny FD": load_tiny_features()} if tiny else {}
    try:
        if files.inception is not None:
            found["FID"] = load_inception(files.inception)
        if files.dino is not None:
            found["FD-DINOv2"] = load_dino(files.dino)
        heads = None if files.lpips is None else load_lpips(files.lpips).to(device)
    except MetricError as error:
        raise ConfigError(str(error)) from error
    return Networks({name: network.to(device) for name, network in found.items()}, heads)


@dataclass
class Meter:
    """Everything that is measured, and the features of a reference to compare with."""

    rewards: dict[str, Reward]
    networks: Networks
    offload: bool = True
    at_once: int = 16
    reference: dict[str, Tensor] = field(default_factory=dict)  # network -> features (N, D)

    def look_at(self, folder: Path) -> int:
        """Take a folder's pictures as the reference of all distances, -> how many they are."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.networks.by_name}
        count = 0
        for batch in batches(image_files(folder), self.at_once):
            count += len(batch)
            for name, network in self.networks.by_name.items():
                parts[name].append(extract(network, batch, self.at_once)[0])
        self.reference = {name: torch.cat(found) for name, found in parts.items()}
        return count


class Tally:
    """What a meter finds in one set of pictures, added piece by piece; `group` pictures of a prompt come together."""

    def __init__(self, meter: Meter, group: int):
        self.meter, self.group = meter, group
        self.scores: dict[str, list[Tensor]] = {name: [] for name in meter.rewards}
        self.features: dict[str, list[Tensor]] = {name: [] for name in meter.networks.by_name}
        self.logits: list[Tensor] = []
        self.looks: list[Tensor] = []  # mean LPIPS within each group

    def add(self, images: Tensor, prompts: list[str]) -> None:
        """Pictures of whole groups, (P * G, H, W, 3), with their prompts (P * G,)."""
        meter = self.meter
        for name, values in score(meter.rewards, images, prompts, offload=meter.offload).items():
            self.scores[name].append(values)
        for name, network in meter.networks.by_name.items():
            features, *logits = extract(network, images, meter.at_once)
            self.features[name].append(features)
            self.logits += logits
        if meter.networks.lpips is not None and self.group > 1:
            self.looks += pairwise(meter.networks.lpips, images, self.group)

    def metrics(self) -> dict[str, float]:
        """Every metric by name; a reward's is the mean of the scores that did not fail."""
        found = {name: _mean(torch.cat(parts)) for name, parts in self.scores.items()}
        for name, parts in self.features.items():
            features = torch.cat(parts)
            if name in self.meter.reference:
                found[name] = frechet(features, self.meter.reference[name])
            if name == "tiny FD" and self.group > 1:
                found["tiny diversity"] = diversity(features, self.group)
        if self.logits:
            found["Inception Score"] = inception_score(torch.cat(self.logits))
        if self.looks:
            found["LPIPS diversity"] = float(torch.stack(self.looks).mean())
        return found

    def failed(self) -> dict[str, int]:
        """Scores that failed, by reward."""
        return {name: int((~torch.cat(parts).isfinite()).sum()) for name, parts in self.scores.items()}


def _mean(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else math.nan


@torch.no_grad()
def pairwise(network: Lpips, images: Tensor, group: int) -> list[Tensor]:
    """Mean LPIPS between the pictures of each prompt, (P * G, H, W, 3) -> P numbers."""
    device = next(network.parameters()).device
    return [network.pairwise(part.to(device)).cpu() for part in images.split(group)]


def images_in(folder: Path) -> list[Path]:
    """The pictures in a folder and below it, by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def image_files(folder: Path) -> list[Path]:
    """The pictures in a folder and below it. Raises ConfigError where there are fewer than 2."""
    files = images_in(folder) if folder.is_dir() else []
    if len(files) < 2:
        raise ConfigError(
            f"--reference {folder} holds {len(files)} images ({', '.join(IMAGE_SUFFIXES)}), but a distance needs 2 or "
            "more, better thousands. Give a folder of real images."
        )
    return files


def read_image(file: Path) -> Tensor:
    """A picture turned as its EXIF says, float (1, H, W, 3) in [0, 1]. Raises ConfigError that names a broken one."""
    if not file.is_file():
        raise ConfigError(f"{file} does not exist. Give a picture, or a folder with some.")
    try:
        with Image.open(file) as picture:
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"), np.float32)
    except Exception as error:  # a file may be broken in many places, and Pillow has a kind of error for each
        raise ConfigError(
            f"{file} is not a picture that can be read ({type(error).__name__}: {error}). "
            "Leave it out, or save it anew, smaller if it is large."
        ) from None
    return torch.from_numpy(pixels / 255)[None]


def batches(files: list[Path], at_once: int) -> Iterator[Tensor]:
    """Pictures of files, neighbours of one size together, (b, H, W, 3) with b up to `at_once`."""
    kept: list[Tensor] = []
    for file in files:
        picture = read_image(file)
        if kept and (kept[0].shape != picture.shape or len(kept) == at_once):
            yield torch.cat(kept)
            kept = []
        kept.append(picture)
    yield torch.cat(kept)
