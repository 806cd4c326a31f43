"""The training state: what a run changes, and so what a checkpoint holds."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from comfyui_pcpo.method.advantage import PromptWindow
from comfyui_pcpo.method.constraint import Constraint

from ..config.schema import Config
from ..fingerprints import reward_fingerprints
from ..memory.transfer import cloned
from ..policy.base import Policy
from .ema import LoraEma
from .interrupts import interrupts
from .optimizer import make_optimizer


@dataclass
class TrainingState:
    """A policy's LoRA, its optimizer, its EMA, the window of rewards, finished updates, an adaptive KL weight."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    window: PromptWindow
    ema: LoraEma | None = None
    done: int = 0
    kl_weight: float | None = None  # the adaptive one; None where objective.kl_weight is fixed
    constraints: dict[str, Constraint] = field(default_factory=dict)  # by the reward's name

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        """One optimizer step with the gradients at hand."""
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step()
        self.optimizer.zero_grad(set_to_none=True)

    def load_moments(self, saved: dict[str, Any]) -> None:
        """Restore the optimizer's moments; learning rate and weight decay stay those of the configuration."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)

    @contextmanager
    def sampling(self, policy: str) -> Iterator[None]:
        """Inside, the LoRA is the one that samples: the latest, or its EMA."""
        with self.ema.in_place() if policy == "ema" and self.ema is not None else nullcontext():
            yield

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Whatever ends the body early leaves LoRA, EMA, optimizer, window and count as they were before it."""
        parameters, done, kl_weight = self.policy.trainable(), self.done, self.kl_weight
        constraints = {name: constraint.state_dict() for name, constraint in self.constraints.items()}
        values = cloned([p.detach() for p in parameters])
        optimizer_state, window_state = cloned(self.optimizer.state_dict()), copy.deepcopy(self.window.state_dict())
        ema = None if self.ema is None else (self.ema.steps, cloned(self.ema.values))
        try:
            yield
        except BaseException:
            with interrupts.hold():
                with torch.no_grad():
                    for p, value in zip(parameters, values, strict=True):
                        p.copy_(value)
                        p.grad = None
                self.optimizer.load_state_dict(optimizer_state)
                self.window.load_state_dict(window_state)
                self.done, self.kl_weight = done, kl_weight
                for name, constraint in self.constraints.items():
                    constraint.load_state_dict(constraints[name])
                if self.ema is not None and ema is not None:
                    self.ema.restart(*ema)
            raise


def make_training_state(policy: Policy, config: Config) -> TrainingState:
    """A fresh state around the policy's LoRA."""
    o, a, r = config.optimizer, config.advantage, config.reward
    ema = LoraEma(policy.trainable(), o.ema_decay, o.ema_every) if o.ema_decay else None
    kl_weight = config.guard.kl_start if config.guard.kl_budget else None
    of = [list(map(list, r.weights.items())), r.standardises, reward_fingerprints(r.weights)]  # in the window's order
    window = PromptWindow(a.window, min(a.min_count, a.window), of=of)
    constraints = {name: Constraint(r.constraint_rate, r.constraint_limit) for name in r.constraints}
    optimizer = make_optimizer(policy.trainable(), o)
    return TrainingState(policy, optimizer, window, ema, kl_weight=kl_weight, constraints=constraints)
