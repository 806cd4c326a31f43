import torch
from torch import Tensor

def stochastic_rounding(value: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor: ...
