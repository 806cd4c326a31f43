from typing import Any

from torch import Tensor

def fix_empty_latent_channels(
    model: Any,
    latent_image: Tensor,
    downscale_ratio_spacial: int | None = None,
    downscale_ratio_temporal: int | None = None,
) -> Tensor: ...
def prepare_noise(latent_image: Tensor, seed: int, noise_inds: Any = None) -> Tensor: ...
