"""CLIPScore: similarity of image and prompt under OpenAI's CLIP. The name includes the scale."""

from typing import TYPE_CHECKING, ClassVar, cast

from torch import Tensor

from comfyui_pcpo.reward.base import Reward
from comfyui_pcpo.reward.clip import CLIP_FILE, VIT_L_14, ClipShape, cosine, open_clip_model
from comfyui_pcpo.reward.weights.checkpoint import load_strict, locate, read_state
from comfyui_pcpo.reward.weights.preprocess import crop_round
from comfyui_pcpo.reward.weights.tokens import clip_tokens, distinct

if TYPE_CHECKING:
    from open_clip.model import CLIP


class ClipCosine(Reward):
    """Cosine of image and prompt under CLIP ViT-L/14."""

    name = "clip_cosine"
    typical_range = (0.1, 0.35)
    files = (CLIP_FILE,)
    shape: ClassVar[ClipShape] = VIT_L_14

    def build(self) -> "CLIP":
        path = locate(self.settings, self.files[0], self.name)
        model = open_clip_model(self.shape)
        load_strict(model, read_state(path, self.files[0]), path)
        self.scale = model.logit_scale.detach().float().exp().item()  # before half precision rounds it
        return model.to(self.settings.dtype)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        model = cast("CLIP", self.model)
        unique, index = distinct(prompts)
        texts = model.encode_text(clip_tokens(unique).to(self.device))
        pixels = crop_round(images.to(self.device)).to(self.settings.dtype)
        return cosine(model.encode_image(pixels), texts[index.to(self.device)])


class ClipScore25(ClipCosine):
    """2.5 max(cos, 0).

    Hessel et al. 2021, CLIPScore, equation of section 3
    """

    name = "clipscore_2.5"
    typical_range = (0.4, 0.9)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 2.5 * super().score_batch(images, prompts).clamp(min=0)


class ClipScore100(ClipCosine):
    """100 max(cos, 0), the scale that torchmetrics reports."""

    name = "clipscore_100"
    typical_range = (15.0, 35.0)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * super().score_batch(images, prompts).clamp(min=0)


class ClipLogits(ClipCosine):
    """exp(logit scale) cos, CLIP's training logits; the scale, about 100, is part of the weights.

    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, figure 3
    """

    name = "clip_logits"
    typical_range = (10.0, 35.0)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.scale * super().score_batch(images, prompts)
