"""Copies between the CPU and the model's device: no waits that can be avoided."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

AT_ONCE = 64 * 2**20
"""Bytes of one download, which take as much of the GPU's memory."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From pinned memory, so that the CPU does not wait until a GPU has it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copies_on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU, many in one transfer, since the CPU waits for each."""
    copies = [t.detach().clone() if t.device.type == "cpu" else t for t in tensors]
    for group in _transfers(tensors):
        flat = torch.cat([tensors[i].detach().flatten() for i in group]).cpu()
        for i, part in zip(group, flat.split([tensors[i].numel() for i in group]), strict=True):
            copies[i] = part.view(tensors[i].shape).clone()  # safetensors takes no views of one memory
    return copies


def _transfers(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Tensors of one device and type by number, as many as one download takes."""
    waiting: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        if t.device.type == "cpu":
            continue
        group = waiting.setdefault((t.device, t.dtype), [])
        if group and sum(tensors[k].nbytes for k in group) + t.nbytes > AT_ONCE:
            yield waiting.pop((t.device, t.dtype))
            group = waiting.setdefault((t.device, t.dtype), [])
        group.append(i)
    yield from waiting.values()


def cloned(tree: Any) -> Any:
    """A state dict whose tensors are copies on the CPU, where they take none of a GPU's memory."""
    leaves, spec = tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for i, copy in zip(places, copies_on_cpu([leaves[i] for i in places]), strict=True):
        leaves[i] = copy
    return tree_unflatten(leaves, spec)
