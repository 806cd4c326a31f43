class LatentFormat:
    scale_factor: float
    latent_channels: int
    latent_rgb_factors: list[list[float]] | None
    latent_rgb_factors_bias: list[float] | None
