"""Stage `align`: the reader learns to find what drawings show and to compare them with captions."""

from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.tiny.align import CELL, CELLS, PIXELS, AlignConfig, AlignImageEncoder, read_images, save_config
from comfyui_pcpo.tiny.captions import COLORS, KINDS, PATTERNS, Scene, caption, is_valid
from comfyui_pcpo.tiny.judge import judge
from tools.tiny.codec import encode
from tools.tiny.data import Drawings, draw_scenes, random_scene
from tools.tiny.draw import Box
from tools.tiny.fit import StageSettings, batch_indices, fit, numpy_generator
from tools.tiny.folders import Folders
from tools.tiny.labels import matches
from tools.tiny.latents import load_autoencoder
from tools.tiny.text import load_text, tokens
from tools.tiny.wording import sample_caption

SPREAD = 0.5  # of the heat around a centre, in cells


def heat_targets(boxes: list[list[Box]]) -> Tensor:
    """Gaussian around each centre, 1 in its own cell, (B,) -> (B, KINDS, 8, 8)."""
    target = torch.zeros(len(boxes), len(KINDS), CELLS, CELLS)
    places = (torch.arange(CELLS) + 0.5) * CELL
    for row, found in enumerate(boxes):
        for box in found:
            across, down = (places - box.x) / CELL, (places - box.y) / CELL
            bump = torch.exp(-(down[:, None].square() + across[None].square()) / (2 * SPREAD**2))
            bump[box.y // CELL, box.x // CELL] = 1
            channel = target[row, KINDS.index(box.kind)]
            channel.copy_(torch.maximum(channel, bump))
    return target


def heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CenterNet's focal loss (arXiv 1904.07850, equation 1), per object."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = target == 1
    hit = -((1 - p).square() * p.log())[centre].sum()
    miss = -((1 - target).pow(4) * p.square() * (1 - p).log())[~centre].sum()
    return (hit + miss) / centre.sum()


def width_loss(logits: Tensor, boxes: list[list[Box]]) -> Tensor:
    """Absolute error of the log of each object's width in cells, (B, 1, 8, 8) -> ()."""
    places = [(n, box.y // CELL, box.x // CELL, box.width / CELL) for n, found in enumerate(boxes) for box in found]
    n, y, x, width = zip(*places, strict=True)
    return F.l1_loss(logits[list(n), 0, list(y), list(x)], torch.tensor(width).log())


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in one respect, so that captions are told apart by each of their words."""
    other = random_scene(rng)
    things = (replace(other.things[0], count=scene.things[0].count, size=scene.things[0].size), *scene.things[1:])
    changed = [
        replace(scene, things=scene.things[::-1]),
        replace(scene, things=things),
        replace(scene, things=(replace(scene.things[0], count=int(rng.integers(1, 5)), size=None), *scene.things[1:])),
        replace(scene, color=other.color),
        replace(scene, pattern=other.pattern),
        replace(scene, relation=other.relation),
    ]
    valid = [new for new in changed if is_valid(new) and new != scene]
    return valid[rng.integers(len(valid))] if valid else other


def contrast(embedded: Tensor, texts: Tensor, fits: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of images against captions (B, K) and back; every matching caption counts."""
    logits = embedded @ texts.T * scale.exp().clamp(max=30)
    fits = fits.float()
    forth = (fits / fits.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    used = fits.sum(0) > 0
    back = (fits / fits.sum(0).clamp(min=1) * logits.log_softmax(0)).sum(0)[used].mean()
    return -forth - back


class AlignLoss:
    """Sum of all losses on a batch of augmented drawings."""

    def __init__(self, drawings: Drawings, settings: StageSettings, folders: Folders):
        self.drawings, self.vae = drawings, load_autoencoder(folders).to(memory_format=torch.channels_last)
        self.tokenizer, self.text = load_text(folders.shared)
        self.order = batch_indices(len(drawings.scenes), settings.batch)

    @torch.no_grad()
    def augment(self, images: Tensor) -> Tensor:
        """What generated images look like: some decoded from noisy latents, some blurred, all with pixel noise."""
        images, part = images.clone(), len(images) // 8
        latents = encode(self.vae, images[:part])
        latents = latents + 0.4 * torch.rand(part, 1, 1, 1) * torch.randn_like(latents)
        images[:part] = self.vae.decode(latents).sample.clamp(-1, 1).to(images.dtype)
        side = int(torch.randint(PIXELS // 3, PIXELS, ()))
        small = F.interpolate(images[part : 3 * part], (side, side), mode="bilinear", antialias=True)
        images[part : 3 * part] = F.interpolate(small, (PIXELS, PIXELS), mode="bilinear")
        return images + 0.15 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)

    def __call__(self, model: AlignImageEncoder) -> Tensor:
        index, rng = next(self.order), numpy_generator()
        scenes, boxes = ([part[i] for i in index.tolist()] for part in (self.drawings.scenes, self.drawings.boxes))
        images = self.drawings.images(index).to(memory_format=torch.channels_last)
        cells = model.trunk(self.augment(images))
        features = model.summarize(cells)
        said = [sample_caption(scene, rng) for scene in scenes] + [near_miss(scene, rng) for scene in scenes]
        with torch.no_grad():
            texts = self.text(tokens(self.tokenizer, [caption(scene) for scene in said])).text_embeds
        texts = F.normalize(texts.float(), dim=-1)
        total = contrast(model.embed(features).float(), texts, matches(scenes, said), model.logit_scale)
        colors = torch.tensor([list(COLORS).index(str(scene.color)) for scene in scenes])
        patterns = torch.tensor([PATTERNS.index(str(scene.pattern)) for scene in scenes])
        total = total + F.cross_entropy(model.color(features).float(), colors)
        total = total + F.cross_entropy(model.pattern(features).float(), patterns)
        total = total + heat_loss(model.heat(cells).float(), heat_targets(boxes))
        return total + width_loss(model.width(cells).float(), boxes)


def train_align(settings: StageSettings, folders: Folders) -> None:
    model = AlignImageEncoder(AlignConfig()).to(memory_format=torch.channels_last)
    nn.init.constant_(model.heat.bias, -4.0)  # type: ignore[arg-type]
    loss = AlignLoss(draw_scenes(settings.images, seed=50, allowed=lambda scene: True), settings, folders)
    test = draw_scenes(settings.at_most(200), seed=60, allowed=lambda scene: True)
    folder = folders.models / "emoji-align"
    folder.mkdir(parents=True, exist_ok=True)

    def report(average: nn.Module) -> str:
        assert isinstance(average, AlignImageEncoder)
        save_config(model.config, folder)
        state = {key: value.half().contiguous() for key, value in average.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        readings = read_images(average, test.every_image)
        right = [all(judge(r, s).values()) for r, s in zip(readings, test.scenes, strict=True)]
        return f"{100 * sum(right) / len(right):.1f} % of drawings read without an error"

    fit("align", model, lambda: loss(model), settings, report)
