"""Stage `polish`: a small network learns to rate how far a drawing was degraded."""

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.tiny.captions import is_held_out
from comfyui_pcpo.tiny.polish import PolishNet, load_polish
from tools.tiny.data import draw_scenes
from tools.tiny.degrade import degraded
from tools.tiny.fit import StageSettings, batch_indices, fit
from tools.tiny.folders import Folders
from tools.tiny.latents import load_autoencoder

POLISH_DRAWINGS = 6000


def r_squared(network: nn.Module, images: Tensor, vae: nn.Module) -> float:
    """Share of the variance of cleanness that the network explains, (B, 3, H, W) -> a number up to 1."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        copies, clean = degraded(images, vae)
    found = torch.cat([network(part) for part in copies.split(50)]).float()
    return 1 - float((found - clean).square().mean() / clean.var(correction=0))


@torch.no_grad()
def polish_quality(folders: Folders, number: int) -> float:
    """R squared of the trained network on new drawings, of combinations that were held out."""
    images = draw_scenes(number, seed=90, allowed=is_held_out).every_image
    return r_squared(load_polish(folders.models / "emoji-polish"), images, load_autoencoder(folders))


def train_polish(settings: StageSettings, folders: Folders) -> None:
    drawings = draw_scenes(settings.at_most(POLISH_DRAWINGS), seed=70)
    vae, model = load_autoencoder(folders), PolishNet()
    order = batch_indices(len(drawings.scenes), settings.batch)
    test = draw_scenes(settings.at_most(100), seed=80).every_image
    folder = folders.models / "emoji-polish"
    folder.mkdir(parents=True, exist_ok=True)

    def loss() -> Tensor:
        copies, clean = degraded(drawings.images(next(order)), vae)
        return F.mse_loss(model(copies).float(), clean)

    @torch.no_grad()
    def report(average: nn.Module) -> str:
        state = {key: value.half().contiguous() for key, value in average.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        return f"R squared {r_squared(average, test, vae):.2f} on new drawings"

    fit("polish", model, loss, settings, report)
