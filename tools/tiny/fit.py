"""The training loop that all stages share: optimizers, a running average of the weights, states to continue from."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tools.tiny.muon import Muon

logger = logging.getLogger("tiny")
DECAY = 0.3  # the last part of the time in which the learning rate falls to zero
REPORTS = 25


@dataclass(frozen=True)
class StageSettings:
    """How a stage trains."""

    work: Path  # folder of drawings and training states
    minutes: float = 30.0  # wall-clock
    batch: int = 64
    lr: float = 1e-3
    images: int = 30_000  # drawings
    resume: bool = False  # continue from the saved weights, averages, optimizer state and step
    half: bool = True  # bfloat16 autocast
    muon: bool = False
    compiled: bool = False  # torch.compile

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes:g}, but a stage trains for a time. Use --minutes above 0.")

    def at_most(self, number: int) -> int:
        """Of `number` drawings to measure with, as many as there are drawings to train on."""
        return min(number, self.images)


@dataclass
class Training:
    """A model in training: its weights, their running average, the optimizers, and the steps taken so far."""

    model: nn.Module
    average: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    minutes: float = 0.0

    def save(self, path: Path) -> None:
        """Write a state to resume from; a crash while writing leaves the previous one."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "minutes": self.minutes,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.minutes = state["step"], state["minutes"]

    def update(self, loss: Tensor, lr: float) -> None:
        """One step of each optimizer, then the running average."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)


def make_optimizers(model: nn.Module, settings: StageSettings) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon`, Muon (kellerjordan.github.io/posts/muon) for the matrices and kernels of blocks."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {name: p for name, p in trained.items() if settings.muon and "block" in name and p.ndim > 1}
    others = [parameter for name, parameter in trained.items() if name not in matrices]
    adam = torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    if not matrices:
        return [adam]
    muon = Muon(matrices.values(), lr=settings.lr)
    return [adam, muon]


def start(model: nn.Module, path: Path, settings: StageSettings) -> Training:
    """A new training, or the one saved at `path`."""
    training = Training(model, copy.deepcopy(model).requires_grad_(False), make_optimizers(model, settings))
    if settings.resume:
        if not path.is_file():
            raise FileNotFoundError(f"No training state at {path}. Leave out --resume for a first run.")
        training.load(path)
        torch.manual_seed(training.step)  # other batches, captions and noise than before
        logger.info("resuming at step %d after %.1f minutes", training.step, training.minutes)
    return training


def fit(
    name: str, model: nn.Module, loss: Callable[[], Tensor], settings: StageSettings, report: Callable[[nn.Module], str]
) -> None:
    """Train for `minutes` at a constant rate, then down to zero; `report` saves the average and says how good it is."""
    path = settings.work / f"{name}.pt"
    training = start(model, path, settings)
    if settings.compiled:
        model.compile()
    before, began, first, reported, running_loss = training.minutes, time.time(), training.step, 0.0, 0.0
    done = 0.0
    while done < 1:
        done = (time.time() - began) / (60 * settings.minutes)
        warm = min(1.0, (training.step - first + 1) / 100)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.half):
            value = loss()
        training.update(value, settings.lr * warm * min(1.0, max(0.01, (1 - done) / DECAY)))
        running_loss = value.item() if training.step == first + 1 else 0.98 * running_loss + 0.02 * value.item()
        if done - reported > 1 / REPORTS or done >= 1:
            reported, spent = done, time.time() - began
            training.minutes = before + spent / 60
            training.save(path)
            pace, note = spent / (training.step - first), report(training.average)
            progress = 100 * done, training.step, running_loss, pace, note
            logger.info("%5.1f %%  step %d  loss %.4f  %.2f s/step  %s", *progress)


def numpy_generator() -> np.random.Generator:
    """A generator seeded by PyTorch's, so that one seed decides captions, batches and noise."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))


def batch_indices(count: int, batch: int) -> Iterator[Tensor]:
    """Indices of random batches without end; each pass goes over everything."""
    if count < batch:
        raise ValueError(f"batch is {batch}, but there are {count} drawings. Use --batch {count} or less.")
    while True:
        yield from (index for index in torch.randperm(count).split(batch) if len(index) == batch)
