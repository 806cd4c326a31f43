"""Stage `text`: the text encoder's pooled embedding learns to state all that a caption says or leaves unsaid."""

import copy

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.tiny.captions import Scene, caption
from tools.tiny.data import random_scene, trained
from tools.tiny.fit import StageSettings, fit, numpy_generator
from tools.tiny.folders import Folders
from tools.tiny.labels import SLOTS, slots
from tools.tiny.text import WIDTH, make_text_encoder, make_tokenizer, tokens
from tools.tiny.wording import sample_caption


def captions(number: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes as captions state them, none held out."""
    said: list[Scene] = []
    while len(said) < number:
        scene = random_scene(rng)
        if trained(scene):
            said.append(sample_caption(scene, rng))
    return said


def train_text(settings: StageSettings, folders: Folders) -> None:
    tokenizer = make_tokenizer(folders.shared / "tokenizer")
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in SLOTS.items()})
    model = nn.ModuleList([make_text_encoder(tokenizer), heads])
    right = {"share": 0.0}

    def loss() -> Tensor:
        said = captions(settings.batch, numpy_generator())
        ids = tokens(tokenizer, [caption(scene) for scene in said])
        pooled = F.normalize(model[0](ids).text_embeds.float(), dim=-1) * WIDTH**0.5
        found, target = {name: heads[name](pooled) for name in SLOTS}, slots(said)
        right["share"] = min(float((found[name].argmax(1) == target[name]).float().mean()) for name in SLOTS)
        return sum((F.cross_entropy(found[name], target[name]) for name in SLOTS), start=pooled.new_zeros(()))

    def report(average: nn.Module) -> str:
        copy.deepcopy(average[0]).half().save_pretrained(folders.shared / "text_encoder")  # type: ignore[index]
        return f"{100 * right['share']:.0f} % right at the hardest attribute"

    fit("text", model, loss, settings, report)
