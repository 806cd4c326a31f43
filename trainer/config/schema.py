"""The one configuration tree: a field's type, default, range and sentence serve the nodes, `--help` and the README."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from comfyui_pcpo.method.credit import CREDITS
from comfyui_pcpo.method.ddim_variance import Sigma
from comfyui_pcpo.method.forward_process import FORWARD_OBJECTIVES
from comfyui_pcpo.method.samplers import SAMPLERS
from comfyui_pcpo.method.surrogate import FORMS, OBJECTIVES

if TYPE_CHECKING:
    MethodName = ObjectiveName = CreditName = FormName = str
else:  # the choices are the method's own tables, so an addition there needs no edit here
    MethodName = Literal[("auto", *SAMPLERS)]
    ObjectiveName = Literal[(*OBJECTIVES, *FORWARD_OBJECTIVES)]
    CreditName = Literal[tuple(CREDITS)]
    FormName = Literal[tuple(FORMS)]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the number, the rule and the way out."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def one_or_more(value: Any) -> Any:
    """A name alone is a list of one."""
    return (value,) if isinstance(value, str) and value else value


Names = Annotated[tuple[str, ...], BeforeValidator(one_or_more)]


class ModelConfig(Section):
    name: str = Field(
        default="emoji-flow", description="emoji-flow, emoji-eps, a .safetensors checkpoint, a folder, or a hub name."
    )
    config: str | None = Field(
        default=None,
        description="Folder or hub name of a pipeline of the checkpoint's kind, for the parts that the file lacks.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:1.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the model's frozen weights and forward passes; LoRA, ratios and losses are float32.",
    )
    quantize: Literal["none", "fp8", "int8", "4bit"] = Field(
        default="none",
        description="Store the frozen layers of the model's blocks in 8 bits (fp8, int8) or 4 bits (4bit needs "
        "bitsandbytes): less memory, slower.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the update: less memory, slower."
    )
    offload: bool = Field(
        default=True,
        description="Text encoders and VAE are on the GPU only while they work; false saves the time of moving them.",
    )
    compile: bool = Field(
        default=False, description="Compile the model's blocks with torch.compile: slow to start, then faster."
    )
    shard: bool = Field(
        default=False,
        description="Each process of `accelerate launch` keeps only its share of the frozen weights (FSDP); one "
        "process keeps them all.",
    )

    @model_validator(mode="after")
    def fits(self) -> "ModelConfig":
        if self.precision == "float16":
            raise ValueError(
                "precision = float16 ends at 6e-8, and gradients of one step's loss are smaller: all would be 0. "
                "Use bfloat16 or float32."
            )
        if self.shard and (self.quantize != "none" or self.compile):
            other = "compile = true" if self.compile else f"quantize = {self.quantize}"
            raise ValueError(f"shard = true does not go with {other}. Use one of the two.")
        return self


class PromptsConfig(Section):
    lines: Names = Field(default=(), description="Prompts to train on; a text or a list.")
    file: Path | None = Field(
        default=None, description="Text file, one prompt per line; lines that start with # are left out."
    )
    negative: str = Field(default="", description="Negative prompt of classifier-free guidance.")

    def found(self) -> list[str]:
        """All prompts that there are, in order, without blanks."""
        prompts = list(self.lines)
        if self.file is not None and self.file.is_file():
            prompts += self.file.read_text(encoding="utf-8").splitlines()
        return [p.strip() for p in prompts if p.strip() and not p.strip().startswith("#")]

    def read(self) -> list[str]:
        """All prompts, in order, without blanks. Raises ConfigError where there are none."""
        if self.file is not None and not self.file.is_file():
            raise ConfigError(f"prompts.file {self.file} does not exist. Give a text file, one prompt per line.")
        prompts = self.found()
        if not prompts:
            source = f"{self.file} holds" if self.file else "prompts.lines and prompts.file hold"
            raise ConfigError(f"{source} 0 prompts, but training needs at least 1. Write one prompt per line.")
        return prompts


class RolloutConfig(Section):
    prompts_per_update: int = Field(default=4, ge=1, description="Prompts drawn for each update.")
    group_size: int = Field(default=8, ge=2, description="Images per prompt; advantages compare them with each other.")
    steps: int = Field(default=10, ge=2, le=1000, description="Denoising steps.")
    method: MethodName = Field(
        default="auto", description="Stochastic sampler; auto is ddim for epsilon models and flow_sde for flow models."
    )
    noise_level: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Randomness of the sampler; if left out the method's usual value, and 0 for awm and nft.",
    )
    sigma: Sigma = Field(default="native", description="Standard deviations of ddim steps.")
    target_weight: float | None = Field(
        default=None, gt=0, description="Weight w* that sigma = paper or uniform aims at."
    )
    cfg: float = Field(
        default=1.0, ge=0, le=30, description="Classifier-free guidance scale, in training too; 1 turns it off."
    )
    detach_unconditional: bool = Field(
        default=False, description="No gradient through the unconditional branch (Flow-GRPO)."
    )
    batch_cfg: bool = Field(
        default=True,
        description="Both branches of the guidance in one model call; false takes two, with half the activations each.",
    )
    shared_noise: bool = Field(
        default=False, description="Start all images of a group from the same noise (DanceGRPO)."
    )
    branch: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Number of stochastic steps at which the images of a group part; they share the noise and the "
        "deterministic steps before, computed once. 0 makes every step stochastic.",
    )
    branch_first: int = Field(
        default=0, ge=0, le=1000, description="Branch at one of the first k trainable steps only; 0 allows every step."
    )
    branch_points: int = Field(
        default=1, ge=1, le=1000, description="Groups per prompt that part at different steps of one shared trajectory."
    )
    policy: Literal["latest", "ema"] = Field(
        default="latest",
        description="LoRA that samples: the latest, or its slow average (needs optimizer.ema_decay; awm and nft only).",
    )
    sde_window: int = Field(
        default=0, ge=0, description="Only so many random neighbouring steps are stochastic; 0 means all."
    )
    guidance: float = Field(
        default=3.5, ge=0, le=30, description="Guidance that a distilled model such as FLUX.1-dev takes as an input."
    )
    shift: float | None = Field(
        default=None, gt=0, le=20, description="Shift of a flow model's noise levels; its own scheduler's if left out."
    )
    images_at_once: int = Field(default=16, ge=1, description="Images per model call; lower it when memory runs out.")
    height: int | None = Field(default=None, ge=8, description="Picture height in pixels; the model's own if left out.")
    width: int | None = Field(default=None, ge=8, description="Picture width in pixels; the model's own if left out.")


class RewardConfig(Section):
    weights: dict[str, float] = Field(
        default={"alignment": 1.0},
        description="Rewards to train on with their weights, or one name; module:Class names one of your own.",
    )
    standardise: bool = Field(default=True, description="Z-score each reward within its group before they are added.")
    held_out: Names = Field(default=(), description="Rewards that are measured and never trained on; a name or a list.")
    max_failed: float = Field(
        default=0.5, ge=0, le=1, description="Stop when a larger share of one update's scores failed."
    )
    folder: Path | None = Field(
        default=None, description="Folder with the rewards' weight files; models/rewards if left out."
    )
    device: str = Field(default="auto", description="auto (as the model), cpu, cuda or cuda:1.")
    precision: Literal["float32", "float16"] = Field(
        default="float32", description="Precision of the rewards' networks; float16 halves their memory."
    )
    images_at_once: int = Field(
        default=16, ge=1, description="Images per call of a reward's network; lower it when memory runs out."
    )
    offload: bool = Field(
        default=True, description="Rewards leave the GPU between rollouts; false saves the time that moving them takes."
    )

    @field_validator("weights", mode="before")
    @classmethod
    def named(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) and value else value

    @field_validator("weights")
    @classmethod
    def some(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("names 0 rewards, but training needs at least 1. Try {alignment = 1.0}")
        return value


class AdvantageConfig(Section):
    kind: Literal["group", "window"] = Field(
        default="group", description="Compare within the group, or per prompt over time."
    )
    spread: Literal["group", "batch"] = Field(
        default="group", description="Divide by each group's spread or by the batch's."
    )
    clip: float = Field(default=5.0, gt=0, description="Largest advantage, in standard deviations.")
    window: int = Field(default=32, ge=2, description="Rewards remembered per prompt when kind = window.")
    min_count: int = Field(
        default=16, ge=2, description="Below so many remembered rewards the batch's statistics serve."
    )


class ObjectiveConfig(Section):
    name: ObjectiveName = Field(
        default="log_hinge",
        description="Surrogate loss; log_hinge is PCPO's. awm and nft noise the finished pictures again instead of "
        "replaying their steps; credit and form do not apply to them.",
    )
    credit: CreditName = Field(
        default="proportionate", description="Weight of each denoising step in the loss; proportionate is PCPO's."
    )
    form: FormName = Field(default="exact", description="How the weight enters the log-ratio.")
    clip_range: float = Field(
        default=1e-3, gt=0, lt=1, description="How far a step's ratio may move before it stops counting."
    )
    nft_beta: float = Field(
        default=1.0, gt=0, le=1, description="nft: how far its good and bad model stand from the sampling one."
    )
    kl_weight: float = Field(
        default=0.0, ge=0, description="Weight of the KL divergence to the model without its LoRA."
    )
    kl_images: int = Field(default=4, ge=0, description="Images per update whose KL is measured when kl_weight is 0.")
    kl_every: int = Field(
        default=10,
        ge=1,
        description="Updates between measurements of the KL when kl_weight is 0; each costs model calls.",
    )
    kl_mask: float = Field(
        default=0.0,
        ge=0,
        description="Instead of the clip, drop terms whose step has moved by more than this KL and would move on "
        "(Flow-DPPO; 1e-5 is usual); 0 keeps the clip.",
    )
    train_steps: float = Field(
        default=1.0, gt=0, le=1, description="Share of the denoising steps trained in each update."
    )
    last_step: bool = Field(default=False, description="Train the last denoising step too; most samplers leave it out.")
    first_steps: int = Field(
        default=0, ge=0, le=1000, description="Train only the first k denoising steps; 0 trains all."
    )
    skip_last: int | None = Field(
        default=None, ge=0, le=1000, description="Leave out the last k denoising steps; if unset, last_step decides."
    )
    loss_weight: Literal["none", "tempflow"] = Field(
        default="none", description="Factor on each step's loss, outside the clip; tempflow is TempFlow-GRPO's."
    )
    rescale_credit: bool = Field(
        default=True,
        description="Keep the sum of the native weights whatever the credit; false keeps its published constant.",
    )
    shared_noise: bool = Field(
        default=False,
        description="awm and nft: noise all images of a group alike, so that they are compared fairly.",
    )
    levels: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="awm and nft: train this many stratified random noise levels per update; 0 trains all.",
    )
    level_credit: Literal["uniform", "proportionate"] = Field(
        default="uniform",
        description="awm and nft: weight of each noise level; proportionate is that of its step's time.",
    )
    likelihood: Literal["uniform", "adaptive"] = Field(
        default="uniform", description="awm: weight of a sample's likelihood; adaptive divides by its mean error."
    )


class LoraConfig(Section):
    rank: int = Field(default=8, ge=1, le=1024, description="Rank of the LoRA.")
    alpha: float | None = Field(
        default=None, gt=0, description="LoRA alpha; the rank if left out, so that the scale is 1."
    )
    targets: Literal["attention", "linear", "all"] = Field(
        default="linear",
        description="Trained layers: attention, attention and feed-forward, or these and convolutions.",
    )
    start: Path | None = Field(default=None, description="Existing LoRA file to continue from.")

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """What the second factor is multiplied by, alpha / rank."""
        return self.effective_alpha / self.rank


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit keeps the moments of large factors in 8 bits; it needs bitsandbytes."
    )
    learning_rate: float = Field(default=3e-4, gt=0, le=1, description="AdamW's learning rate.")
    minibatches: int = Field(
        default=2, ge=1, description="Optimizer steps per update; each takes its share of every group."
    )
    epochs: int = Field(default=1, ge=1, description="Times that each update goes over its images.")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Longer gradients are shortened to this norm.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second moment.")
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of a running average of the LoRA, which is then what is kept; 0: none.",
    )
    ema_every: int = Field(default=8, ge=1, description="Optimizer steps between two values of that average.")


class RunConfig(Section):
    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the run's folder."
    )
    folder: Path = Field(default=Path("output/pcpo"), description="Folder that holds the runs.")
    updates: int = Field(
        default=100, ge=1, description="Updates to do; each is a rollout, its scores and its gradient steps."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of prompts, noise and the LoRA's first values.")
    preview_every: int = Field(default=5, ge=0, description="Updates between pictures in grids/; 0 means none.")
    save_every: int = Field(default=10, ge=1, description="Updates between checkpoints.")
    tensorboard: bool = Field(default=False, description="Also write TensorBoard events (needs the tensorboard extra).")


class Config(Section):
    """Everything a run is made of; derived numbers are computed, never asked for."""

    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
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
                "Use a window of at most that many steps, or 0 for all."
            )
        self._check_branch()
        if self.advantage.kind == "window" and self.advantage.min_count > self.advantage.window:
            raise ValueError(
                f"advantage.min_count {self.advantage.min_count} is more than advantage.window {self.advantage.window} "
                "remembers, so the window would never serve. Use a smaller min_count or a longer window."
            )
        if self.rollout.sigma != "native" and self.rollout.target_weight is None:
            raise ValueError(
                f"rollout.sigma = {self.rollout.sigma} needs rollout.target_weight (the paper uses 4.5 for 50 steps). "
                "Set it, or use sigma = native."
            )
        return self

    def _check_branch(self) -> None:
        r, forward = self.rollout, self.objective.name in FORWARD_OBJECTIVES
        if r.branch and (forward or r.sde_window):
            other = f"objective.name = {self.objective.name}" if forward else f"rollout.sde_window = {r.sde_window}"
            raise ValueError(
                f"rollout.branch {r.branch} cannot be combined with {other}: a branch decides which steps are "
                "stochastic and trained. Set one of them to its default."
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

    @property
    def images_per_update(self) -> int:
        return self.rollout.prompts_per_update * self.rollout.group_size
