from torch import nn

class Clamp(nn.Module): ...

class TAESD(nn.Module):
    taesd_encoder: nn.Module
    taesd_decoder: nn.Module
    def __init__(self, *, latent_channels: int = 4) -> None: ...
