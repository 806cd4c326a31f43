"""Rewards computed from pixels: colorfulness and redness."""

from torch import Tensor

from comfyui_pcpo.reward.base import Reward


def colorfulness(images: Tensor) -> Tensor:
    """Colourfulness of images in [0, 1], (B, H, W, 3) -> (B,).

    Hasler and Suesstrunk 2003, Measuring Colourfulness in Natural Images, metric M3 with pixels in [0, 1]:
    M = |std of (rg, yb)| + 0.3 |mean of (rg, yb)|,  rg = R - G,  yb = (R + G) / 2 - B
    """
    red, green, blue = images.flatten(1, 2).unbind(-1)
    rg, yb = red - green, (red + green) / 2 - blue
    std = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    mean = (rg.mean(1).square() + yb.mean(1).square()).sqrt()
    return std + 0.3 * mean


class Colorfulness(Reward):
    """Hasler and Suesstrunk's colourfulness: 0 is grey, 0.23 quite colourful, 0.43 extremely."""

    name = "colorfulness"
    needs_prompt = False
    typical_range = (0.0, 1.2)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return colorfulness(images.float() / 255)


class Redness(Reward):
    """Mean of red minus the mean of green and blue; a smoke test that any model learns within minutes."""

    name = "redness"
    needs_prompt = False
    typical_range = (-1.0, 1.0)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        red, green, blue = (images.float() / 255).mean((1, 2)).unbind(-1)
        return red - (green + blue) / 2
