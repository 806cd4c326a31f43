"""The configuration of a run: its sections, and the rules that involve more than one of them."""

from pydantic import model_validator

from comfyui_pcpo.method.forward_process import ALL_OBJECTIVES

from .errors import ConfigError
from .guard_section import GuardConfig
from .reward_section import RewardConfig
from .run_section import RunConfig
from .sections import (
    AdvantageConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PromptsConfig,
    RolloutConfig,
)
from .values import Section


class Config(Section):
    """The complete configuration of a run; derived numbers are computed, never asked for."""

    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def arithmetic(self) -> "Config":
        group, parts = self.rollout.group_size, self.optimizer.minibatches
        if group % parts:
            raise ValueError(
                f"rollout.group_size {group} does not split into optimizer.minibatches {parts} equal parts. "
                f"Use a group size that is a multiple of {parts}, or minibatches = 1."
            )
        if self.rollout.sde_window > self.rollout.steps:
            raise ValueError(
                f"rollout.sde_window {self.rollout.sde_window} is longer than rollout.steps {self.rollout.steps}. "
                "Use a window of at most that many steps, or 0 to make every step stochastic."
            )
        self._check_branch()
        self._check_last_step()
        if self.advantage.kind == "window" and self.advantage.min_count > self.advantage.window:
            raise ValueError(
                f"advantage.min_count {self.advantage.min_count} is more than advantage.window {self.advantage.window}"
                ", so the window would never be used. Use a smaller min_count or a longer window."
            )
        if self.rollout.sigma != "native" and self.rollout.target_weight is None:
            raise ValueError(
                f"rollout.sigma = {self.rollout.sigma} needs rollout.target_weight (the paper uses 4.5 for 50 steps). "
                "Set it, or use sigma = native."
            )
        changing = "constraints" if self.reward.constraints else "schedule" if self.reward.schedule else ""
        if changing and self.advantage.kind == "window":
            raise ValueError(
                f"reward.{changing} changes weights during the run, but advantage.kind = window compares with earlier "
                "updates. Use kind = group."
            )
        if self.guard.kl_budget and self.objective.kl_weight:
            raise ValueError(
                f"guard.kl_budget {self.guard.kl_budget:g} adapts the KL weight, but objective.kl_weight "
                f"{self.objective.kl_weight:g} fixes it. Set one of them to 0."
            )
        return self

    def _check_branch(self) -> None:
        r, forward = self.rollout, not ALL_OBJECTIVES[self.objective.name].replays_steps
        if r.branch and (forward or r.sde_window):
            other = f"objective.name = {self.objective.name}" if forward else f"rollout.sde_window = {r.sde_window}"
            raise ValueError(
                f"rollout.branch {r.branch} cannot be combined with {other}: a branch decides which steps are "
                "stochastic and trained. Set one of them to its default."
            )
        if r.branch and self.model.shard:
            raise ValueError(
                f"rollout.branch {r.branch} cannot be combined with model.shard: processes that train different steps "
                "cannot gather the model's weights together. Use model.quantize, or branch = 0."
            )
        if self.objective.levels and not forward:
            raise ValueError(
                f"objective.levels {self.objective.levels} belongs to awm and nft, and objective.name is "
                f"{self.objective.name}. Use objective.train_steps or first_steps to train fewer steps."
            )
        if forward and r.decode == "predicted" and r.noise_level:
            raise ValueError(
                f"rollout.decode = predicted cannot be combined with objective.name = {self.objective.name} and a "
                "noise_level: the scored image would not be the one that is trained on. Use decode = final."
            )
        if forward and r.shared_noise and not r.noise_level:
            raise ValueError(
                f"rollout.shared_noise = true cannot be combined with objective.name = {self.objective.name} and no "
                "rollout.noise_level: the images of a group would be equal, and nothing would be trained. Set "
                "shared_noise = false or a noise_level; objective.shared_noise, the noise of training, is another "
                "option."
            )
        if not r.branch and r.branch_points > 1:
            raise ValueError(f"rollout.branch_points is {r.branch_points}, but needs rollout.branch of 1 or more.")
        if r.prompts_per_update % r.branch_points:
            raise ValueError(
                f"rollout.prompts_per_update {r.prompts_per_update} is not a multiple of rollout.branch_points "
                f"{r.branch_points}. Each prompt takes that many groups."
            )
        if r.policy == "ema" and not (forward and self.optimizer.ema_decay):
            raise ValueError(
                "rollout.policy = ema needs optimizer.ema_decay above 0 and objective.name awm or nft; "
                "objectives on the trajectory sample from the latest LoRA. Set those, or use policy = latest."
            )

    def _check_last_step(self) -> None:
        """Refuse to train a step whose noise the scored image does not show."""
        r, o = self.rollout, self.objective
        noisy = ALL_OBJECTIVES[o.name].replays_steps and r.method != "cps"  # cps ends without noise
        last = o.skipped == 0 and not 0 < o.first_steps < r.steps
        if r.decode == "predicted" and noisy and last:
            option = "last_step = true" if o.skip_last is None else "skip_last = 0"
            raise ValueError(
                f"rollout.decode = predicted cannot be combined with objective.{option}: the scored image does not "
                "have the noise of the last step, so training it would follow chance. Use decode = final, or "
                f"objective.{'last_step = false' if o.skip_last is None else 'skip_last = 1'}."
            )

    @property
    def trains_kl(self) -> bool:
        """Whether the loss has a KL term, so that the KL of all images is measured."""
        return self.objective.kl_weight > 0 or self.guard.kl_budget > 0

    @property
    def images_per_update(self) -> int:
        return self.rollout.prompts_per_update * self.rollout.group_size


__all__ = [
    "AdvantageConfig",
    "Config",
    "ConfigError",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
]
