"""Image-text similarity under the embedded tiny encoder."""

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_pcpo.reward.base import Reward
from comfyui_pcpo.tiny.align import PIXELS, AlignImageEncoder, load_image_encoder
from comfyui_pcpo.tiny.pipelines import MODELS


class TinyEncoder(nn.Module):
    """The image encoder of emoji-align and the text encoder that the embedded generators are conditioned on."""

    def __init__(self, image: AlignImageEncoder, text: nn.Module):
        super().__init__()
        self.image, self.text = image, text

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Cosine of images in [-1, 1] and their prompts, (B, 3, 128, 128), (B, L), (B, L) -> (B,)."""
        image = self.image.embed(self.image.encode(images))
        text = F.normalize(self.text(input_ids=tokens, attention_mask=mask).text_embeds.float(), dim=-1)
        return (image.float() * text).sum(-1)


def encoder_input(images: Tensor) -> Tensor:
    """Input of the embedded encoders, uint8 (B, H, W, 3) -> (B, 3, 128, 128) in [-1, 1]."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-2:] != (PIXELS, PIXELS):
        pixels = F.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear", antialias=True)
    return pixels * 2 - 1


class Alignment(Reward):
    """Cosine of image and prompt; only meaningful for images and prompts of the embedded models."""

    name = "alignment"
    typical_range = (-0.2, 0.9)

    def build(self) -> TinyEncoder:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(MODELS / "shared" / "tokenizer")
        folder = MODELS / "shared" / "text_encoder"
        text = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder)).float()
        text.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return TinyEncoder(load_image_encoder(), text)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert isinstance(self.model, TinyEncoder)
        text = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return self.model(encoder_input(images.to(self.device)), text.input_ids, text.attention_mask)
