from torch import Tensor, nn

from .latent_formats import LatentFormat

class BaseModel(nn.Module):
    latent_format: LatentFormat
    def load_model_weights(self, sd: dict[str, Tensor], unet_prefix: str = "") -> BaseModel: ...

class Flux(BaseModel): ...
class Flux2(Flux): ...
