"""The configuration section of the rewards."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .sections import Names, Section


class RewardConfig(Section):
    weights: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        default={"alignment": 1.0},
        description="Training rewards and their weights, or a single name; module:Class is a custom reward.",
    )
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
        if not any(value.values()):
            raise ValueError("every weight is 0, so nothing would be trained. Give one reward a weight other than 0")
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
        return self
