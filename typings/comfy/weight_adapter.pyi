import torch

class WeightAdapterBase:
    weights: list[torch.Tensor]
