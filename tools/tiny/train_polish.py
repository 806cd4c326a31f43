"""Stage `polish`: a small network learns to rate how far a drawing was spoiled."""

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.tiny.polish import PolishNet
from tools.tiny.data import draw_scenes
from tools.tiny.fit import Settings, batches, fit
from tools.tiny.folders import Folders
from tools.tiny.latents import load_vae
from tools.tiny.spoil import spoiled

DRAWINGS = 6000


def explained(judge: nn.Module, images: Tensor, vae: nn.Module) -> float:
    """Share of the variance of cleanness that the judge explains (R squared)."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        copies, clean = spoiled(images, vae)
    found = torch.cat([judge(part) for part in copies.split(50)]).float()
    return 1 - float((found - clean).square().mean() / clean.var(correction=0))


def train_polish(settings: Settings, folders: Folders) -> None:
    drawings, vae, model = draw_scenes(min(DRAWINGS, settings.images), seed=70), load_vae(folders), PolishNet()
    order = batches(len(drawings.scenes), settings.batch)
    test = draw_scenes(100, seed=80).images(torch.arange(100))
    folder = folders.models / "emoji-polish"
    folder.mkdir(parents=True, exist_ok=True)

    def loss() -> Tensor:
        copies, clean = spoiled(drawings.images(next(order)), vae)
        return F.mse_loss(model(copies).float(), clean)

    @torch.no_grad()
    def report(average: nn.Module) -> str:
        state = {key: value.half().contiguous() for key, value in average.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        return f"R squared {explained(average, test, vae):.2f} on new drawings"

    fit("polish", model, loss, settings, report)
