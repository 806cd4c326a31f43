"""PickScore v1: a CLIP ViT-H-14 fine-tuned on choices between two images."""

from typing import TYPE_CHECKING, ClassVar, cast

from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardFile
from comfyui_pcpo.reward.clip import VIT_H_14, ClipShape, cosine, transformers_clip
from comfyui_pcpo.reward.weights.checkpoint import drop_suffixes, load_strict, locate, read_state
from comfyui_pcpo.reward.weights.preprocess import crop_floor
from comfyui_pcpo.reward.weights.tokens import distinct, plain_clip_tokens

if TYPE_CHECKING:
    from transformers import CLIPModel


def embedding(output: object) -> Tensor:
    """Embedding (B, D) of CLIPModel.get_*_features: a tensor up to transformers 4, a model output since 5."""
    return output if isinstance(output, Tensor) else cast("Tensor", output.pooler_output)  # type: ignore[attr-defined]


class PickScore(Reward):
    """exp(logit_scale) times the cosine of image and prompt.

    Kirstain et al. 2023, Pick-a-Pic, equation 1 before the softmax
    """

    name = "pickscore"
    typical_range = (18.0, 24.0)
    files = (RewardFile("yuvalkirstain/PickScore_v1", "model.safetensors", 3_900_000_000, "licence of the code: MIT"),)
    shape: ClassVar[ClipShape] = VIT_H_14

    def build(self) -> "CLIPModel":
        path = locate(self.settings, self.files[0], self.name)
        state = drop_suffixes(read_state(path, self.files[0]), (".position_ids",))
        model = transformers_clip(self.shape)
        load_strict(model, state, path)
        self.scale = model.logit_scale.detach().float().exp().item()  # before half precision rounds it
        return cast("CLIPModel", model.to(self.settings.dtype))  # type: ignore[arg-type]

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        model = cast("CLIPModel", self.model)
        unique, index = distinct(prompts)
        texts = embedding(model.get_text_features(input_ids=plain_clip_tokens(unique).to(self.device)))
        pixels = crop_floor(images.to(self.device)).to(self.settings.dtype)
        return self.scale * cosine(
            embedding(model.get_image_features(pixel_values=pixels)), texts[index.to(self.device)]
        )
