from torch import nn

class TAESD(nn.Module):
    def __init__(self, *, latent_channels: int = 4) -> None: ...
