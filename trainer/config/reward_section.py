"""The configuration section of the rewards."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from comfyui_pcpo.method.constraint import scheduled_weight

from .values import Names, Section

RewardWeight = Annotated[float, Field(ge=-1e6, le=1e6)]
UpdateNumber = Annotated[int, Field(ge=1, le=10_000_000)]


class RewardConfig(Section):
    weights: dict[str, RewardWeight] = Field(
        default={"alignment": 1.0},
        description="Training rewards and their weights, or a single name; module:Class is a custom reward. As an "
        "option, --reward.weights NAME replaces the file's rewards, and --reward.weights.NAME 1 adds one to them.",
    )
    schedule: dict[str, tuple[tuple[UpdateNumber, RewardWeight], ...]] = Field(
        default={},
        description="Weights that change over a run: a trained reward's points [update, weight], linear in between."
        " They replace its weight.",
    )
    constraints: Names = Field(
        default=(),
        description="Rewards whose mean must not fall below that of the first update; their weight grows if it does.",
    )
    constraint_rate: float = Field(
        default=0.2,
        gt=0,
        le=100,
        description="Growth of a constraint's weight per update and standard deviation below the start.",
    )
    constraint_limit: float = Field(default=5.0, gt=0, le=1000, description="Largest weight of a constraint.")
    standardise: bool = Field(
        default=True,
        description="Standardise several rewards over the population of the advantage before summing them.",
    )
    held_out: Names = Field(default=(), description="Rewards that are logged but not trained on: a name or a list.")
    max_failed: float = Field(
        default=0.5, ge=0, le=1, description="Stop when more than this fraction of an update's scores failed."
    )
    folder: Path | None = Field(default=None, description="Folder with reward model weights; default: models/rewards.")
    device: str = Field(
        default="auto", description="Device of the reward models: auto (same as the model), cpu, cuda or cuda:N."
    )
    precision: Literal["float32", "float16"] = Field(
        default="float32", description="Precision of the reward models; float16 halves their memory."
    )
    images_at_once: int = Field(
        default=16, ge=1, le=100_000, description="Images per call of a reward model; lower this if memory runs out."
    )
    patience: float = Field(
        default=60.0,
        ge=0,
        le=86400,
        description="Seconds to wait for a reward server or endpoint that does not answer before the run ends.",
    )
    overlap: bool = Field(
        default=True,
        description="Let rewards of servers and endpoints score finished images while the next ones are sampled; the "
        "scores are the same.",
    )
    offload: bool = Field(
        default=True, description="Move reward models to the CPU between rollouts; disable for speed."
    )

    @field_validator("weights", mode="before")
    @classmethod
    def named(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) and value else value

    @field_validator("weights")
    @classmethod
    def some(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("no reward is set, but training needs at least one. Try {alignment = 1.0}")
        return value

    @model_validator(mode="after")
    def apart(self) -> "RewardConfig":
        both = [name for name in self.held_out if name in self.weights]
        twice = [name for n, name in enumerate(self.held_out) if name in self.held_out[:n]]
        if both:
            raise ValueError(
                f"{both[0]} is both trained (reward.weights) and held out (reward.held_out), but a held-out reward "
                "shows what training does not see. Remove it from one of them"
            )
        if twice:
            raise ValueError(f"held_out names {twice[0]} twice. Name each reward once")
        others = (*self.weights, *self.held_out)
        double = [name for n, name in enumerate(self.constraints) if name in (*others, *self.constraints[:n])]
        if double:
            raise ValueError(
                f"constraints names {double[0]}, which is named elsewhere in reward too. A constraint has its own "
                "weight: name the reward once"
            )
        return self

    @model_validator(mode="after")
    def schedules_rise(self) -> "RewardConfig":
        for name, points in self.schedule.items():
            if name not in self.weights:
                raise ValueError(f"schedule names {name}, which reward.weights does not. Add it there, with any weight")
            updates = [update for update, _ in points]
            if not points or updates != sorted(set(updates)):
                raise ValueError(
                    f"schedule of {name} has the updates {updates}, but needs one or more, rising, from 1. "
                    "Try [[1, 1.0], [50, 0.2]]"
                )
        if not any(weight for name in self.weights for weight in self._all_weights(name)):
            of = " of the schedule" if self.schedule else ""
            raise ValueError(f"every weight{of} is 0, so nothing would be trained. Give one that is not 0")
        return self

    def _all_weights(self, name: str) -> list[float]:
        """Those that a trained reward has over the run."""
        return [weight for _, weight in self.schedule.get(name, ((1, self.weights[name]),))]

    @property
    def names(self) -> tuple[str, ...]:
        """All rewards: trained, constraints, held out."""
        return (*self.weights, *self.constraints, *self.held_out)

    @property
    def last_weights(self) -> dict[str, float]:
        """The weights that the trained rewards end with: those by which updates of a run are compared."""
        return self.weights | {name: points[-1][1] for name, points in self.schedule.items()}

    @property
    def standardises(self) -> bool:
        """Whether the trained rewards are summed in units of their spread: a single one (without those of 0) is not."""
        return self.standardise and sum(weight != 0 for weight in self.last_weights.values()) > 1

    def weights_at(self, number: int) -> dict[str, float]:
        """The weights of the trained rewards in an update, without those of constraints."""
        scheduled = {name: scheduled_weight(list(points), number) for name, points in self.schedule.items()}
        return self.weights | scheduled
