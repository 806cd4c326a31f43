"""Networks that turn pictures into features, to compare sets of pictures by; each is read from a local file.

Every network takes 8-bit pictures of any size, uint8 (B, H, W, 3); weights are never downloaded.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from comfyui_pcpo.metrics.inception import Inception
from comfyui_pcpo.metrics.lpips import WIDTHS, Lpips
from comfyui_pcpo.reward.alignment import small
from comfyui_pcpo.reward.base import RewardError, RewardFile, eight_bit
from comfyui_pcpo.reward.weights.checkpoint import load_strict, read_state, without
from comfyui_pcpo.reward.weights.preprocess import SIDE, bicubic
from comfyui_pcpo.tiny.align import AlignImageEncoder, load_image_encoder
from comfyui_pcpo.tiny.pipelines import MODELS

RELEASE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
INCEPTION = RewardFile(RELEASE, "weights-inception-2015-12-05-6726825d.pth", 95_600_000, "Apache-2.0")
ALEXNET = RewardFile("https://download.pytorch.org/models", "alexnet-owt-7be5be79.pth", 244_000_000, "BSD-3-Clause")
HEADS = RewardFile("the lpips package, lpips/weights/v0.1", "alex.pth", 6_009, "BSD-2-Clause")
DINO = "facebook/dinov2-large"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def read_weights(path: Path, file: RewardFile) -> dict[str, Tensor]:
    """The tensors of a local file. Raises RewardError that says where an absent one is published."""
    if not path.is_file():
        raise RewardError(
            f"{path} does not exist. Give the path of {file.filename} ({file.bytes / 1e6:.3g} MB, {file.licence}), "
            f"which is published at {file.hub_id}."
        )
    return read_state(path, file)


def load_inception(path: Path) -> Inception:
    """Inception from torch-fidelity's or pytorch-fid's file, which are the same."""
    model = Inception()
    load_strict(model, without(read_weights(path, INCEPTION), (".num_batches_tracked",)), path)
    return model.eval().requires_grad_(False)


def load_lpips(path: Path) -> Lpips:
    """LPIPS from torchvision's AlexNet file; the heads, alex.pth, lie beside it."""
    model, beside = Lpips(), path.with_name(HEADS.filename)
    state = {name: x for name, x in read_weights(path, ALEXNET).items() if name.startswith("features.")}
    heads = {name: x.flatten() for name, x in read_weights(beside, HEADS).items()}
    names = {f"lin{n}.model.1.weight": f"heads.{n}" for n in range(len(WIDTHS))}
    load_strict(model.features, {name.removeprefix("features."): x for name, x in state.items()}, path)
    load_strict(model.heads, {names.get(name, name).removeprefix("heads."): x for name, x in heads.items()}, beside)
    return model.eval().requires_grad_(False)


class Dino(nn.Module):
    """DINOv2's class token, (B, H, W, 3) -> (B, D).

    Stein et al. 2023 (arXiv 2306.04675): features that follow human judgement of generated pictures more closely.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        pixels = bicubic(images, SIDE, SIDE).permute(0, 3, 1, 2).float() / 255
        mean, std = pixels.new_tensor(MEAN).view(3, 1, 1), pixels.new_tensor(STD).view(3, 1, 1)
        return self.network(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0]


def load_dino(folder: Path) -> Dino:
    """DINOv2 from a folder with config.json and weights, as the hub has them."""
    if not (folder / "config.json").is_file():
        raise RewardError(
            f"{folder} has no config.json. Give a folder with config.json and model.safetensors of {DINO} "
            "(1.22 GB, Apache-2.0) from the Hugging Face hub."
        )
    from transformers import Dinov2Model

    try:
        loaded: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RewardError(f"{folder} cannot be read as DINOv2 ({error}). Get {DINO} again.") from error
    network, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise RewardError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}. Get {DINO} again.")
    return Dino(network).eval().requires_grad_(False)


class Tiny(nn.Module):
    """Features of the embedded encoder, (B, H, W, 3) -> (B, 128); they know the embedded models' little world only."""

    def __init__(self, encoder: AlignImageEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode(small(images))


def load_tiny_features() -> Tiny:
    return Tiny(load_image_encoder(MODELS / "emoji-align"))


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, at_once: int = 16) -> tuple[Tensor, ...]:
    """What a network makes of pictures, float (N, H, W, 3) in [0, 1] -> one or more tensors (N, ...) on the CPU."""
    device = next(iter([*network.parameters(), *network.buffers()])).device
    found = [network(eight_bit(part).to(device)) for part in images.split(at_once)]
    rows = [part if isinstance(part, tuple) else (part,) for part in found]
    return tuple(torch.cat(column).cpu() for column in zip(*rows, strict=True))
