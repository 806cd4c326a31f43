"""Networks that turn images into features, to compare sets of images by; each is read from a local file.

Every network takes 8-bit images of any size, uint8 (B, H, W, 3); weights are never downloaded.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from comfyui_pcpo.metrics.errors import MetricError, weight_errors
from comfyui_pcpo.metrics.inception import Inception
from comfyui_pcpo.metrics.lpips import CHANNELS, Lpips
from comfyui_pcpo.reward.alignment import encoder_input
from comfyui_pcpo.reward.base import RewardFile, eight_bit
from comfyui_pcpo.reward.weights.checkpoint import load_strict, read_state
from comfyui_pcpo.reward.weights.preprocess import SIDE, bicubic
from comfyui_pcpo.tiny.align import AlignImageEncoder, load_image_encoder

RELEASE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
INCEPTION = RewardFile(RELEASE, "weights-inception-2015-12-05-6726825d.pth", 95_600_000, "Apache-2.0")
ALEXNET = RewardFile("https://download.pytorch.org/models", "alexnet-owt-7be5be79.pth", 244_000_000, "BSD-3-Clause")
HEADS = RewardFile("the lpips package, lpips/weights/v0.1", "alex.pth", 6_009, "BSD-2-Clause")
DINO = "facebook/dinov2-large"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def read_weights(path: Path, file: RewardFile) -> dict[str, Tensor]:
    """The tensors of a local file. Raises MetricError, which names the source of a missing file."""
    if not path.is_file():
        raise MetricError(
            f"{path} does not exist. Give the path of {file.filename} ({file.bytes / 1e6:.3g} MB, {file.licence}), "
            f"which is published at {file.hub_id}."
        )
    with weight_errors():
        return read_state(path, file)


def load_inception(path: Path) -> Inception:
    """Inception from torch-fidelity's file, or from pytorch-fid's, which holds the same weights."""
    state = read_weights(path, INCEPTION)
    try:
        return Inception(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MetricError(
            f"{path} holds other weights than Inception's ({reason:.200}). Give {INCEPTION.filename} from "
            f"{INCEPTION.hub_id}."
        ) from error


def load_lpips(path: Path) -> Lpips:
    """LPIPS from torchvision's AlexNet file; the file of the heads, alex.pth, must be in the same folder."""
    model, heads_path = Lpips(), path.with_name(HEADS.filename)
    state = {name: x for name, x in read_weights(path, ALEXNET).items() if name.startswith("features.")}
    heads = {name: x.flatten() for name, x in read_weights(heads_path, HEADS).items()}
    names = {f"lin{n}.model.1.weight": f"heads.{n}" for n in range(len(CHANNELS))}
    with weight_errors():
        load_strict(model.features, {name.removeprefix("features."): x for name, x in state.items()}, path)
        heads = {names.get(name, name).removeprefix("heads."): x for name, x in heads.items()}
        load_strict(model.heads, heads, heads_path)
    return model.eval().requires_grad_(False)


class Dino(nn.Module):
    """DINOv2's class token, (B, H, W, 3) -> (B, D).

    Stein et al. 2023 (arXiv 2306.04675): features that match human ratings of generated images better.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        pixels = bicubic(images, SIDE, SIDE).permute(0, 3, 1, 2).float() / 255
        mean, std = pixels.new_tensor(MEAN).view(3, 1, 1), pixels.new_tensor(STD).view(3, 1, 1)
        return self.network(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0]


def load_dino(folder: Path) -> Dino:
    """DINOv2 from a local copy of its hub folder (config.json and weights)."""
    if not (folder / "config.json").is_file():
        raise MetricError(
            f"{folder} has no config.json. Give a folder with config.json and model.safetensors of {DINO} "
            "(1.22 GB, Apache-2.0) from the Hugging Face hub."
        )
    from transformers import Dinov2Model

    try:
        loaded: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MetricError(f"{folder} cannot be read as DINOv2 ({error}). Download {DINO} again.") from error
    network, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise MetricError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}. Download {DINO} again.")
    return Dino(network).eval().requires_grad_(False)


class Tiny(nn.Module):
    """Features of the embedded encoder, (B, H, W, 3) -> (B, 128); only meaningful for images of the embedded models."""

    def __init__(self, encoder: AlignImageEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode(encoder_input(images))


def load_tiny_features() -> Tiny:
    """The features of the embedded encoder."""
    return Tiny(load_image_encoder())


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, at_once: int = 16) -> tuple[Tensor, ...]:
    """A network's outputs for images, float (N, H, W, 3) in [0, 1] -> one or more tensors (N, ...) on the CPU."""
    device = next(iter([*network.parameters(), *network.buffers()])).device
    outputs = [network(eight_bit(part).to(device)) for part in images.split(at_once)]
    rows = [output if isinstance(output, tuple) else (output,) for output in outputs]
    return tuple(torch.cat(column).cpu() for column in zip(*rows, strict=True))
