"""The two text-to-image models: an SD3-type flow transformer and an SD1.5-type epsilon UNet on the same latents."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from tools.tiny.codec import CHANNELS
from tools.tiny.text import WIDTH

LATENT = 16  # of 128x128 images
FIRST = 870  # sampling starts from pure noise at this step or a later one: 8 steps start at 876, 50 at 981
SD15 = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def make_flow() -> SD3Transformer2DModel:
    depth = 3
    return SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=depth,
        num_attention_heads=depth,
        attention_head_dim=64,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=64 * depth,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=LATENT,
        qk_norm="rms_norm",
    )


def make_eps() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=4,  # 32 groups of one channel would take out its mean: the background
    )


def flow_loss(text: CLIPTextModelWithProjection) -> Callable[[SD3Transformer2DModel, Tensor, Tensor], Tensor]:
    """Flow matching: v = eps - x0 at x_t = (1 - t) x0 + t eps, t logit-normal, pushed towards noise as shift 3 does."""

    def loss(model: SD3Transformer2DModel, latents: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            said = text(tokens, output_hidden_states=True)
        hidden, pooled = said.hidden_states[-2], said.text_embeds
        t = torch.sigmoid(0.6 + 1.2 * torch.randn(len(latents)))
        noise = torch.randn_like(latents)
        tt = t[:, None, None, None]
        out = model(
            hidden_states=(1 - tt) * latents + tt * noise,
            timestep=1000 * t,
            encoder_hidden_states=torch.cat([hidden, hidden], -1),
            pooled_projections=torch.cat([pooled, pooled], -1),
        ).sample
        return F.mse_loss(out, noise - latents)

    return loss


def eps_loss(text: CLIPTextModelWithProjection) -> Callable[[UNet2DConditionModel, Tensor, Tensor], Tensor]:
    """Noise prediction on SD1.5's schedule; the error counts as that of the image (1 / alpha_bar, at most 100).

    Unweighted, the noisiest steps, which decide the background's colour, would hardly count. At the steps where
    sampling may start, three inputs in ten are pure noise, as they are then: what SD1.5's schedule leaves of the image
    at its last step would otherwise be looked for in the mean of the noise. Half of the steps are drawn from the
    noisiest three tenths, at a smaller weight, which changes the variance of the loss and not its mean.
    """
    schedule: Any = DDPMScheduler(**SD15)
    density = torch.full((1000,), 0.5)
    density[700:] += 0.5 / 0.3
    weights = (1 / schedule.alphas_cumprod).clamp(max=100)
    weights = weights / weights.mean() / density

    def loss(model: UNet2DConditionModel, latents: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = text(tokens).last_hidden_state
        t = torch.multinomial(density, len(latents), replacement=True)
        noise = torch.randn_like(latents)
        pure = (t >= FIRST) & (torch.rand(len(latents)) < 0.3)
        noisy = torch.where(pure[:, None, None, None], noise, schedule.add_noise(latents, noise, t))
        signal = schedule.alphas_cumprod[t][:, None, None, None]
        wanted = (noisy - signal.sqrt() * latents) / (1 - signal).sqrt()  # the noise, unless the input is pure noise
        out = model(noisy, t, encoder_hidden_states=hidden).sample
        return ((out - wanted).square().flatten(1).mean(1) * weights[t]).mean()

    return loss
