"""The configuration section of the guard against reward hacking."""

from typing import Literal

from pydantic import Field

from .values import Section


class GuardConfig(Section):
    every: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="Updates between measurements of held-out rewards, diversity and distance from the base model on "
        "fixed noise; the best measured update within the limits becomes lora.safetensors. 0 turns the guard off.",
    )
    prompts: int = Field(default=4, ge=1, le=100_000, description="Number of the run's prompts that are measured.")
    images: int = Field(default=4, ge=2, le=10_000, description="Images per measured prompt.")
    tolerance: float = Field(
        default=0.8,  # loose: where images are spoiled for most uses, as the guard is on in the ready configurations
        ge=0,
        le=1e6,
        description="Largest loss of a held-out reward against the base model, in standard deviations of the base "
        "images' scores.",
    )
    diversity_tolerance: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Largest share of the base model's diversity that may be lost.",
    )
    patience: int = Field(
        default=3, ge=1, le=1_000_000, description="Successive measurements beyond the limits before the action."
    )
    action: Literal["stop", "warn"] = Field(
        default="stop", description="Once patience is exhausted, stop the run or only warn."
    )
    kl_budget: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="KL to the reference that an adaptive KL weight holds; 0 keeps the weight fixed.",
    )
    kl_start: float = Field(default=0.01, gt=0, le=1e6, description="First value of the adaptive KL weight.")
