"""The Reward base class, which validates inputs and outputs of all rewards.

Images arrive as float in [0, 1]; rewards see them as a saved file would hold them: RGB, clamped, rounded to 8 bit.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from comfyui_pcpo.prompt import Prompt, metadata_of
from comfyui_pcpo.reward.worker import T, Worker


class RewardError(ValueError):
    """A reward that cannot be constructed or computed; the message has the value, the rule and the fix."""


@dataclass(frozen=True)
class RewardFile:
    """A weight file: hub repository, file name, approximate size in bytes and licence."""

    hub_id: str
    filename: str
    bytes: int
    licence: str


@dataclass(frozen=True)
class RewardSettings:
    """Folder of the weight files, device, dtype of the network, images per forward pass, seconds to wait out an outage.

    A host may add `tick`, called before each batch and several times a second while a reward waits for a server or a
    user's own reward computes (it may raise); `plain`, which removes the host's own syntax from a prompt, such as
    weights; `make_room`, called with a network's bytes before it moves to a GPU; and `download`, how its users call the
    command that downloads weights.
    """

    folder: Path | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    images_at_once: int = 16
    patience: float = 60.0
    tick: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)
    plain: Callable[[str], str] = field(default=lambda prompt: prompt, compare=False, repr=False)
    make_room: Callable[[int], None] = field(default=lambda size: None, compare=False, repr=False)
    download: str = field(default="run: pcpo download", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.images_at_once < 1:
            raise RewardError(
                f"images_at_once is {self.images_at_once}, but a forward pass needs at least one image. Use 1 or more."
            )
        if self.dtype not in (torch.float32, torch.float16):
            raise RewardError(
                f"dtype is {self.dtype}, which changes scores by up to 1e-3. Use torch.float32 or torch.float16."
            )


@dataclass(frozen=True)
class Scores:
    """Scores (B,), NaN = failed, and further outputs of a reward: name -> one entry per image."""

    values: Tensor
    extras: dict[str, list[str]] = field(default_factory=dict)


class Reward:
    """Base class of all rewards. Subclasses define `score_batch`, and `build` if they have a network."""

    name: ClassVar[str] = ""
    needs_prompt: ClassVar[bool] = True
    typical_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    files: ClassVar[tuple[RewardFile, ...]] = ()
    elsewhere: ClassVar[bool] = False  # computed by a server or a person: a thread may wait for it
    learned: list[float] | None = None  # what was learned, where rewards of one name may differ
    _worker: Worker | None = None

    def __init__(self, settings: RewardSettings | None = None):
        self.settings = settings or RewardSettings()
        self.device = torch.device(self.settings.device)
        self.model: nn.Module | None = None
        self.failure = ""  # why a score became NaN most recently, where the reward can say

    @property
    def failure_reason(self) -> str:
        """Why scores failed, as a part of a sentence."""
        return self.failure.rstrip(".") or "NaN or infinite"

    def build(self) -> nn.Module | None:
        """The network with loaded weights, its towers in `settings.dtype`; None for rewards without a network."""
        return None

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor | Scores:
        """Scores of 8-bit images, uint8 (B, H, W, 3) -> (B,). `metadata_of` gives what a prompt has beside its text."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define score_batch. Define it to return one score per image."
        )

    def require_prompts(self, prompts: list[str]) -> None:
        """Raise RewardError for a prompt that the reward cannot score, before any image is generated for it."""

    def load(self) -> "Reward":
        """Load the weights if they are not loaded yet; `score` calls this."""
        if self.model is None:
            with ordinary_tensors():
                model = self._own_code(lambda: checked_network(self.build()))
            if model is not None:
                self.model = model.eval().requires_grad_(False)
                try:
                    self.to(self.device)
                except BaseException:
                    self.model = None  # half of it may have moved: the next call loads it anew
                    raise
        return self

    def unload(self) -> None:
        """Drop the weights; the next `score` loads them again. `to("cpu")` only frees GPU memory."""
        self.model = None

    def unattended(self) -> "Reward":
        """What scores images beside the training, such as the guard's; differs for a reward that asks a person."""
        return self

    def to(self, device: str | torch.device) -> "Reward":
        """Choose the device to score on; a loaded network moves there."""
        self.device = torch.device(device)
        if self.model is not None:
            elsewhere = [p for p in self.model.parameters() if p.device.type != self.device.type]
            if elsewhere and self.device.type != "cpu":
                self.settings.make_room(sum(p.nbytes for p in elsewhere))
            with blamed(self), ordinary_tensors():
                self.model.to(self.device)
        return self

    def score(self, images: Tensor, prompts: list[str], group_size: int | None = None) -> Tensor:
        """One score per image, float32 [0, 1] (B, H, W, C) -> float32 (B,); NaN marks a failed score.

        `group_size` is the number of images per group, for rewards that compare images of a group (GroupReward).
        """
        return self.measure(images, prompts, group_size).values

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: list[str], group_size: int | None = None) -> Scores:
        """`score` with extras, such as the captions that a reward used."""
        check_batch(images, prompts)
        values, extras = [], {}
        prompts = [Prompt(self.settings.plain(prompt), metadata_of(prompt)) for prompt in prompts]
        if prompts:
            self.load()
        for part in self.parts(prompts, group_size):
            self.settings.tick()
            scores = self.measure_batch(images[part], prompts[part])
            values.append(scores.values)
            for key in {**extras, **scores.extras}:
                absent = [""] * (part.stop - part.start)
                extras.setdefault(key, [""] * part.start).extend(scores.extras.get(key, absent))
        return Scores(torch.cat(values) if values else torch.zeros(0), extras)

    def _own_code(self, work: Callable[[], T]) -> T:
        """Call what a subclass defines. A user's own class runs in a thread, from which `tick` and Ctrl-C return."""

        def attributed() -> T:
            with blamed(self):
                return work()

        if type(self).__module__.startswith("comfyui_pcpo."):  # those do return
            return attributed()
        if self._worker is None or self._worker.busy:
            self._worker = Worker()
        return self._worker.call(self.name, attributed, self.settings.tick)

    def parts(self, prompts: list[str], group_size: int | None) -> Iterator[slice]:
        """The consecutive images that one call of `score_batch` scores."""
        for start in range(0, len(prompts), self.settings.images_at_once):
            yield slice(start, min(start + self.settings.images_at_once, len(prompts)))

    def measure_batch(self, images: Tensor, prompts: list[str]) -> Scores:
        """One micro-batch; infinite scores and scores of images with NaN pixels become NaN."""
        scores = self._own_code(lambda: checked_scores(self.score_batch(eight_bit(images), prompts), len(prompts)))
        broken = ~images[..., :3].isfinite().flatten(1).all(1).cpu() | ~scores.values.isfinite()
        return Scores(scores.values.masked_fill(broken, float("nan")), scores.extras)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Weights that are made or moved inside can be used in and out of inference mode, in which some hosts score."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def on_its_device(reward: Reward, offload: bool = True) -> Iterator[Reward]:
    """The reward on its own device; with `offload` it leaves a GPU afterwards, so that others have that memory."""
    reward.to(reward.settings.device)
    try:
        yield reward
    finally:
        if offload and reward.device.type != "cpu":
            reward.to("cpu")


def checked_network(model: object) -> nn.Module | None:
    """What `build` returned."""
    if model is None or isinstance(model, nn.Module):
        return model
    raise RewardError(
        f"build returned a {type(model).__name__}. Return one torch.nn.Module, or None for a reward without a network."
    )


def checked_scores(output: object, count: int) -> Scores:
    """What score_batch returned, its values as float32 on the CPU, (B,)."""
    values, extras = (output.values, output.extras) if isinstance(output, Scores) else (output, {})
    shape = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"type {type(values).__name__}"
    if not isinstance(values, Tensor) or values.shape != (count,) or values.is_complex():
        raise RewardError(
            f"score_batch returned scores of {shape} for {count} images. Return one number per image, a tensor (B,)."
        )
    if not isinstance(extras, dict) or any(not isinstance(e, list) or len(e) != count for e in extras.values()):
        raise RewardError(
            f"score_batch returned extras that are not lists of {count} entries by name. Return one entry per image."
        )
    return Scores(values.detach().to("cpu", torch.float32), extras)


@contextmanager
def blamed(reward: Reward) -> Iterator[None]:
    """Turn what a reward's own code raises into a RewardError with the reward's name, the cause and its place."""
    name = reward.name or type(reward).__name__
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"reward {name}: {error}") from error
    except RewardError as error:
        own = type(error) if type(error).__module__.startswith("comfyui_pcpo.") else RewardError
        raise own(f"reward {name}: {error}") from error
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        cause = " ".join(cause.split()).rstrip(".")
        raise RewardError(f"reward {name} raised {cause} ({place(error, type(reward))}). Fix the reward.") from error


def place(error: BaseException, cls: type) -> str:
    """File and line of the last call in the file of a class, or of the last call at all."""
    frames = traceback.extract_tb(error.__traceback__)
    try:
        file = inspect.getfile(cls)
    except (OSError, TypeError):  # of a class that was typed into a notebook
        file = ""
    own = [frame for frame in frames if frame.filename == file]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


def check_batch(images: Tensor, prompts: list[str]) -> None:
    """Validate a batch of images with one prompt each."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape[1:]:
        raise RewardError(f"images have shape {tuple(images.shape)}, but must be (B, H, W, 3 or 4). Put channels last.")
    if not images.is_floating_point():
        raise RewardError(f"images are {images.dtype}, but must be float in [0, 1]. Divide 8-bit images by 255.")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise RewardError(
            f"Got {len(images)} images and {len(prompts)} prompts. Give a list with one prompt per image."
        )


def eight_bit(images: Tensor) -> Tensor:
    """Pixels of a saved image, float (B, H, W, 3 or 4) -> uint8 (B, H, W, 3): no alpha, clamped, rounded."""
    return (images[..., :3].nan_to_num(0.0, 1.0, 0.0).float().clamp(0, 1) * 255).round().to(torch.uint8)
