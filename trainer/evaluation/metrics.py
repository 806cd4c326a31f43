"""The metrics of `evaluate` on one set of images: rewards, distance to a reference, diversity."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from comfyui_pcpo.metrics.features import extract, load_dino, load_inception, load_lpips, load_tiny_features
from comfyui_pcpo.metrics.frechet import diversity, frechet, inception_score
from comfyui_pcpo.metrics.lpips import Lpips
from comfyui_pcpo.reward import Reward
from comfyui_pcpo.reward.alignment import encoder_input
from comfyui_pcpo.reward.base import eight_bit
from comfyui_pcpo.tiny.align import AlignImageEncoder
from comfyui_pcpo.tiny.tinyeval import is_right, read_and_parse, shares

from ..loop.records import finite_mean
from ..loop.scoring import ImageGroups, score
from .image_files import batches, image_files
from .options import EvaluationOptions

TINYEVAL = "TinyEval, "  # before a task, in the names of metrics
DISTANCE, VARIETY = "distance, lower is better", "variety"
ROLES = {
    **dict.fromkeys(("tiny FD", "FID", "FD-DINOv2"), DISTANCE),
    **dict.fromkeys(("tiny diversity", "LPIPS diversity", "Inception Score"), VARIETY),
}
"""What a metric beside the rewards tells."""


@dataclass(frozen=True)
class Networks:
    """The feature networks in use, by the name of their distance, and LPIPS."""

    by_name: dict[str, torch.nn.Module]
    lpips: Lpips | None = None


def load_networks(tiny: bool, options: EvaluationOptions, device: str) -> Networks:
    """Load the feature networks given; the tiny encoder only for embedded models, whose images it was trained on."""
    networks: dict[str, torch.nn.Module] = {"tiny FD": load_tiny_features()} if tiny else {}
    if options.inception is not None:
        networks["FID"] = load_inception(options.inception)
    if options.dino is not None:
        networks["FD-DINOv2"] = load_dino(options.dino)
    lpips = None if options.lpips is None else load_lpips(options.lpips).to(device)
    return Networks({name: network.to(device) for name, network in networks.items()}, lpips)


@dataclass
class Meter:
    """The rewards and networks that measure, and the features of the reference."""

    rewards: dict[str, Reward]
    networks: Networks
    offload: bool = True
    at_once: int = 16
    reference: dict[str, Tensor] = field(default_factory=dict)  # network -> features (N, D)
    reader: AlignImageEncoder | None = None  # judges images as TinyEval does

    def set_reference(self, folder: Path) -> int:
        """Use a folder of images as the reference of all distances, -> their number."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.networks.by_name}
        count = 0
        for batch in batches(image_files(folder), self.at_once):
            count += len(batch)
            for name, network in self.networks.by_name.items():
                parts[name].append(extract(network, batch, self.at_once)[0])
        self.reference = {name: torch.cat(features) for name, features in parts.items()}
        return count


class Tally:
    """Metrics of one set of images, accumulated batch by batch; the `group` images of a prompt are consecutive."""

    def __init__(self, meter: Meter, group: int):
        self.meter, self.group = meter, group
        self.scores: dict[str, list[Tensor]] = {name: [] for name in meter.rewards}
        self.features: dict[str, list[Tensor]] = {name: [] for name in meter.networks.by_name}
        self.logits: list[Tensor] = []
        self.lpips: list[Tensor] = []  # mean within each group
        self.right: list[bool] = []  # by TinyEval
        self.prompts: list[str] = []

    def add(self, images: Tensor, prompts: list[str]) -> None:
        """Add images of complete groups, (P * G, H, W, 3), and their prompts (P * G,)."""
        meter = self.meter
        groups = ImageGroups(images, prompts, self.group)
        for name, values in score(meter.rewards, groups, offload=meter.offload).items():
            self.scores[name].append(values)
        for name, network in meter.networks.by_name.items():
            features, *logits = extract(network, images, meter.at_once)
            self.features[name].append(features)
            self.logits += logits
        if meter.reader is not None:
            self.right += judged(meter.reader, images, prompts)
            self.prompts += prompts
        if meter.networks.lpips is not None and self.group > 1:
            self.lpips += pairwise(meter.networks.lpips, images, self.group)

    def metrics(self) -> dict[str, float]:
        """Every metric by name; a reward's is the mean of the scores that did not fail."""
        metrics = {name: finite_mean(torch.cat(parts)) for name, parts in self.scores.items()}
        for name, parts in self.features.items():
            features = torch.cat(parts)
            if name in self.meter.reference:
                metrics[name] = frechet(features, self.meter.reference[name])
            if name == "tiny FD" and self.group > 1:
                metrics["tiny diversity"] = diversity(features, self.group)
        if self.right:
            metrics |= {TINYEVAL + task: share for task, share in shares(self.right, self.prompts).items()}
        if self.logits:
            metrics["Inception Score"] = inception_score(torch.cat(self.logits))
        if self.lpips:
            metrics["LPIPS diversity"] = float(torch.stack(self.lpips).mean())
        return metrics

    def failed(self) -> dict[str, int]:
        """Number of failed scores by reward."""
        return {name: int((~torch.cat(parts).isfinite()).sum()) for name, parts in self.scores.items()}


def judged(reader: AlignImageEncoder, images: Tensor, prompts: Sequence[str]) -> list[bool]:
    """Whether each image shows all that its prompt asks for, of any size, (B, H, W, 3) -> B verdicts."""
    return [is_right(*read) for read in read_and_parse(reader, encoder_input(eight_bit(images)), prompts)]


@torch.no_grad()
def pairwise(network: Lpips, images: Tensor, group: int) -> list[Tensor]:
    """Mean LPIPS between the images of each prompt, (P * G, H, W, 3) -> P numbers."""
    device = next(network.parameters()).device
    return [network.pairwise(part.to(device)).cpu() for part in images.split(group)]
