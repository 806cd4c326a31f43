"""Which parts of a pipeline are on the GPU: those at work, while the others wait in the computer's memory."""

from collections.abc import Iterable
from typing import Protocol

import torch


class Movable(Protocol):
    def to(self, device: torch.device) -> object: ...


Parts = dict[str, list[Movable]]


class Offloader:
    """Moves parts, which start on the CPU, by name.

    With `offload` only those that are asked for are on the device; `fixed` ones never leave.
    """

    def __init__(self, parts: Parts, device: torch.device, offload: bool, fixed: Iterable[str] = ()):
        self.parts, self.device = parts, device
        self.offload = offload and device.type != "cpu"
        self.fixed = frozenset(fixed)
        self.present: set[str] = set(parts) if device.type == "cpu" else set()
        self.only(*(self.fixed if self.offload else parts))

    def only(self, *names: str) -> None:
        """Bring these parts to the device, after the others have left it."""
        wanted = set(names) | self.fixed if self.offload else set(self.parts)
        if wanted == self.present:
            return
        for name in sorted(self.present - wanted):
            self._move(name, torch.device("cpu"))
        for name in sorted(wanted - self.present):
            self._move(name, self.device)
        self.present = wanted

    def _move(self, name: str, device: torch.device) -> None:
        for part in self.parts[name]:
            part.to(device)
