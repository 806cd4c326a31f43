"""Configuration: sections and schema, TOML files and options, diagnostics, defaults that depend on the model."""

from .schema import (
    AdvantageConfig,
    Config,
    ConfigError,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)

__all__ = [
    "AdvantageConfig",
    "Config",
    "ConfigError",
    "GuardConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
]
