"""A model's blocks: compiled, or spread over processes.

FSDP: every process keeps its share of the frozen weights and fetches a block's others while that block runs.
"""

from collections.abc import Collection

import torch
from torch import distributed as dist
from torch import nn

from ..config.schema import ConfigError, ModelConfig
from ..loop.distributed import Processes


def sharded(config: ModelConfig) -> bool:
    """Whether the weights are sharded."""
    return config.shard and Processes().many


def blocks_of(denoiser: nn.Module, kinds: str = "_repeated_blocks") -> list[nn.Module]:
    """The blocks that a model is made of, as its class names them; inner ones before those around them."""
    names = getattr(denoiser, kinds, None) or getattr(denoiser, "_no_split_modules", None) or ()
    return [m for m in denoiser.modules() if type(m).__name__ in names][::-1]


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile each block; they share their code, and so the number of its versions that PyTorch allows."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)  # with and without gradient, LoRA, a full batch
    for block in blocks_of(denoiser):
        block.compile()


def shard(denoiser: nn.Module, trainable: Collection[nn.Parameter], device: torch.device) -> None:
    """Spread the frozen weights over all processes, block by block; `trainable` ones stay whole on each.

    Raises ConfigError where PyTorch is too old.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise ConfigError(
            f"model.shard needs PyTorch 2.7, and this is {torch.__version__}. Update it, or use model.quantize."
        ) from None
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    whole = set(trainable)
    for block in blocks_of(denoiser, "_no_split_modules"):
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p in whole})
    fully_shard(denoiser, mesh=mesh, ignored_params=whole)
