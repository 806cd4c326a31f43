"""The configuration section of a run's folder, length and seed."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from .values import Section

RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
"""Names that Windows reserves, with any suffix."""


class RunConfig(Section):
    name: str = Field(default="run", description="Name of the run's folder.")
    folder: Path = Field(default=Path("output/pcpo"), description="Parent folder of all runs.")
    updates: int = Field(
        default=100,
        ge=1,
        le=10_000_000,
        description="Number of updates; each is one rollout, its rewards and the optimizer steps on it.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed for prompt order, noise and LoRA initialisation.")
    preview_every: int = Field(
        default=5, ge=0, le=10_000_000, description="Updates between sample grids in grids/; 0 disables them."
    )
    save_every: int = Field(default=10, ge=1, le=10_000_000, description="Updates between checkpoints.")
    keep: int = Field(
        default=3,
        ge=0,
        le=1_000_000,
        description="Latest checkpoints to keep, besides the best, the guard's and every 100th; 0 keeps all.",
    )
    tensorboard: bool = Field(default=False, description="Also write TensorBoard logs (needs the tensorboard extra).")

    @field_validator("folder", mode="before")
    @classmethod
    def is_given(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("is empty, as an unset variable of a shell is. Use . for the current folder")
        return value

    @field_validator("name")
    @classmethod
    def is_folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?", value):
            raise ValueError(
                "must be 1 to 64 letters, digits, dots, hyphens and underscores, begin with a letter or digit, and "
                "not end with a dot. Use a name such as foxes-2"
            )
        if value.split(".")[0].lower() in RESERVED:
            raise ValueError("is a name that Windows reserves for a device. Use another, such as run-con")
        return value
