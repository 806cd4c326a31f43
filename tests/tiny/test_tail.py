"""The faster decoder of the embedded models."""

import pytest
import torch
from diffusers import AutoencoderTiny

from comfyui_pcpo.tiny.pipelines import SHARED, load_tiny_autoencoder


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 2), (16, 16)])
def test_it_decodes_as_diffusers_does_up_to_the_border(size):
    latents = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1))
    plain = AutoencoderTiny.from_pretrained(SHARED / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        expected, found = (vae.decode(latents).sample for vae in (plain, load_tiny_autoencoder()))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_it_has_the_same_parameters_and_gradients_reach_the_latents():
    plain, vae = AutoencoderTiny.from_pretrained(SHARED / "vae"), load_tiny_autoencoder().requires_grad_(False)
    assert sum(p.numel() for p in vae.parameters()) == sum(p.numel() for p in plain.parameters())
    latents = torch.ones(1, 16, 4, 4, requires_grad=True)
    vae.decode(latents).sample.sum().backward()
    assert latents.grad is not None and latents.grad.abs().amin() > 0
