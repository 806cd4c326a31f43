"""Inception-v3 features for FID and Inception Score, by torch-fidelity (the `fid` extra).

The weights are those of TensorFlow's 2015 network in torch-fidelity's layout; torchvision's inception_v3 is a different
network, and its scores are not comparable.
"""

import io
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from comfyui_pcpo.metrics.errors import MetricError


class Inception(nn.Module):
    """uint8 images (B, H, W, 3) -> pool features (B, 2048) and logits without bias (B, 1008).

    Szegedy et al. 2016, Rethinking the Inception Architecture; Heusel et al. 2017 (arXiv 1706.08500) for the distance
    """

    def __init__(self, state: Mapping[str, Tensor]):
        """Raises MetricError if torch-fidelity is missing, RuntimeError if the weights do not fit."""
        super().__init__()
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MetricError("FID needs the package torch-fidelity. Install it: pip install torch-fidelity") from error
        # torch-fidelity unpickles its weight file with weights_only=False. It gets tensors that were read safely,
        # written to memory again; given no file at all it would download one.
        weights = io.BytesIO()
        torch.save(dict(state), weights)
        weights.seek(0)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(images.permute(0, 3, 1, 2))
