"""Human Preference Score v2 and v2.1: a CLIP ViT-H-14 fine-tuned on human preferences."""

from typing import TYPE_CHECKING, ClassVar, cast

from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardFile
from comfyui_pcpo.reward.clip import VIT_H_14, ClipShape, cosine, open_clip_model
from comfyui_pcpo.reward.weights.checkpoint import load_strict, locate, read_state
from comfyui_pcpo.reward.weights.preprocess import pad_square
from comfyui_pcpo.reward.weights.tokens import clip_tokens, distinct

if TYPE_CHECKING:
    from open_clip.model import CLIP


class HPSv2(Reward):
    """Cosine of image and prompt without logit scale.

    Wu et al. 2023, Human Preference Score v2
    """

    name = "hpsv2"
    typical_range = (0.23, 0.285)
    files = (RewardFile("xswu/HPSv2", "HPS_v2_compressed.pt", 3_940_000_000, "Apache-2.0"),)
    shape: ClassVar[ClipShape] = VIT_H_14

    def build(self) -> "CLIP":
        path = locate(self.settings, self.files[0], self.name)
        state = read_state(path, self.files[0])
        model = open_clip_model(self.shape)
        load_strict(model, state, path)
        return model.to(self.settings.dtype)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        model = cast("CLIP", self.model)
        unique, index = distinct(prompts)
        texts = model.encode_text(clip_tokens(unique).to(self.device))
        pixels = pad_square(images.to(self.device)).to(self.settings.dtype)
        return cosine(model.encode_image(pixels), texts[index.to(self.device)])


class HPSv21(HPSv2):
    """HPSv2 trained on more and newer preferences."""

    name = "hpsv2.1"
    typical_range = (0.14, 0.33)
    files = (RewardFile("xswu/HPSv2", "HPS_v2.1_compressed.pt", 3_940_000_000, "Apache-2.0"),)
