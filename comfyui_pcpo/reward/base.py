"""What a reward is, and the one place that checks what goes into one and what comes out.

Images arrive as float [0, 1]; every reward sees what a saved picture would hold: RGB, clamped, rounded to 8 bit.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn


class RewardError(ValueError):
    """A reward that cannot be made or asked; the message names the number, the rule and the way out."""


@dataclass(frozen=True)
class RewardFile:
    """A weight file: where it is published, its name, its approximate size in bytes and its licence."""

    hub_id: str
    filename: str
    bytes: int
    licence: str


@dataclass(frozen=True)
class RewardSettings:
    """How a reward runs: folder with weight files, device, precision of its network, images per forward pass."""

    folder: Path | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    images_at_once: int = 16

    def __post_init__(self) -> None:
        if self.images_at_once < 1:
            raise RewardError(
                f"images_at_once is {self.images_at_once}, but a forward pass needs images. Use 1 or more."
            )
        if self.dtype not in (torch.float32, torch.float16):
            raise RewardError(
                f"dtype is {self.dtype}, whose rounding costs up to 1e-3. Use torch.float32 or torch.float16."
            )


@dataclass(frozen=True)
class Scores:
    """Scores (B,), NaN = failed, and what else a reward found out: name -> one entry per image."""

    values: Tensor
    extras: dict[str, list[str]] = field(default_factory=dict)


class Reward:
    """Base of all rewards: subclasses write `score_batch`, and `build` where they have a network."""

    name: ClassVar[str] = ""
    needs_prompt: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = True
    typical_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    files: ClassVar[tuple[RewardFile, ...]] = ()
    memory: ClassVar[int] = 0  # bytes of the network in half precision

    def __init__(self, settings: RewardSettings | None = None):
        self.settings = settings or RewardSettings()
        self.device = torch.device(self.settings.device)
        self.model: nn.Module | None = None

    def build(self) -> nn.Module | None:
        """The network with its weights, its towers in `settings.dtype`; None for rewards without one."""
        return None

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor | Scores:
        """Scores of 8-bit pictures, uint8 (B, H, W, 3) -> (B,)."""
        raise NotImplementedError(
            f"{type(self).__name__} lacks score_batch. Write one that returns one score per image."
        )

    def load(self) -> "Reward":
        """Read the weights unless they are here already; `score` does so by itself."""
        if self.model is None:
            model = self.build()
            if model is not None:
                self.model = model.eval().requires_grad_(False).to(self.device)
        return self

    def unload(self) -> None:
        """Forget the weights; the next `score` reads them again. `to("cpu")` only leaves the GPU."""
        self.model = None

    def to(self, device: str | torch.device) -> "Reward":
        self.device = torch.device(device)
        if self.model is not None:
            self.model.to(self.device)
        return self

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One score per image, float32 [0, 1] (B, H, W, C) -> float32 (B,); NaN means that the score failed."""
        return self.measure(images, prompts).values

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: list[str]) -> Scores:
        """As `score`, with extras such as the captions that a reward went by."""
        check(images, prompts)
        values, extras = [], {}
        if len(prompts):
            self.load()
        for start in range(0, len(prompts), self.settings.images_at_once):
            part = slice(start, start + self.settings.images_at_once)
            found = self.measure_batch(images[part], prompts[part])
            values.append(found.values)
            for key, entries in found.extras.items():
                extras.setdefault(key, [""] * start).extend(entries)
        return Scores(torch.cat(values) if values else torch.zeros(0), extras)

    def measure_batch(self, images: Tensor, prompts: list[str]) -> Scores:
        """One micro-batch; an infinite score, and the score of a picture with NaN pixels, is a failed one."""
        found = self.score_batch(eight_bit(images), prompts)
        found = found if isinstance(found, Scores) else Scores(found)
        values = found.values.detach().to("cpu", torch.float32)
        if values.shape != (len(prompts),):
            raise RewardError(
                f"{self.name} returned scores of shape {tuple(values.shape)} for {len(prompts)} images. "
                "score_batch must return one number per image."
            )
        broken = ~images[..., :3].isfinite().flatten(1).all(1).cpu() | ~values.isfinite()
        return Scores(values.masked_fill(broken, float("nan")), found.extras)


def check(images: Tensor, prompts: list[str]) -> None:
    """Refuse what is not a batch of pictures with one prompt each."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape[1:]:
        raise RewardError(f"images have shape {tuple(images.shape)}, not (B, H, W, 3 or 4). Put channels last.")
    if not images.is_floating_point():
        raise RewardError(f"images are {images.dtype}, but must be float in [0, 1]. Divide 8-bit pictures by 255.")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise RewardError(f"{len(images)} images came with {len(prompts)} prompts. Give a list, one for each.")


def eight_bit(images: Tensor) -> Tensor:
    """What a saved picture holds, float (B, H, W, 3 or 4) -> uint8 (B, H, W, 3): no alpha, clamped, rounded."""
    return (images[..., :3].nan_to_num(0.0, 1.0, 0.0).float().clamp(0, 1) * 255).round().to(torch.uint8)
