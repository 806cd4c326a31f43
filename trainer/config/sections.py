"""The sections of the configuration. A field's description is also the tooltip of its node input."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from comfyui_pcpo.method.credit import CREDITS, LOSS_WEIGHTS
from comfyui_pcpo.method.ddim_variance import Sigma
from comfyui_pcpo.method.forward_process import ALL_OBJECTIVES, LIKELIHOODS
from comfyui_pcpo.method.samplers import SAMPLERS
from comfyui_pcpo.method.surrogate import FORMS

from .errors import ConfigError
from .prompt_files import parse_lines, read_prompt_file
from .values import Lines, Section

if TYPE_CHECKING:
    MethodName = ObjectiveName = CreditName = FormName = LossWeightName = LikelihoodName = str
else:  # the choices are the method's own tables, so an addition there needs no edit here
    MethodName = Literal[("auto", *SAMPLERS)]
    ObjectiveName = Literal[tuple(ALL_OBJECTIVES)]
    CreditName = Literal[tuple(CREDITS)]
    FormName = Literal[tuple(FORMS)]
    LossWeightName = Literal[tuple(LOSS_WEIGHTS)]
    LikelihoodName = Literal[tuple(LIKELIHOODS)]


class ModelConfig(Section):
    name: str = Field(
        default="emoji-flow",
        description="emoji-flow, emoji-eps, a .safetensors checkpoint, a diffusers folder or a Hugging Face name.",
    )
    config: str | None = Field(
        default=None,
        description="Pipeline of the same family (folder or Hugging Face name) for what a .safetensors file lacks.",
    )
    device: str = Field(default="auto", description="Device of the model: auto, cpu, cuda or cuda:N.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Precision of the frozen weights and forward passes; LoRA, ratios and losses stay in float32.",
    )
    quantize: Literal["none", "fp8", "int8", "4bit"] = Field(
        default="none",
        description="Store the frozen linear layers in 8 bits (fp8, int8) or 4 bits (4bit, needs bitsandbytes): less "
        "memory, slower.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, slower."
    )
    offload: bool = Field(
        default=True,
        description="Keep text encoders and VAE on the CPU when idle; disable for speed.",
    )
    compile: bool = Field(
        default=False, description="Compile the model's blocks with torch.compile: slower start, faster steps."
    )
    shard: bool = Field(
        default=False,
        description="Shard the frozen weights across the processes of `accelerate launch` (FSDP); no effect with one "
        "process.",
    )

    @field_validator("precision", mode="before")
    @classmethod
    def holds_gradients(cls, value: Any) -> Any:
        if value == "float16":
            raise ValueError(
                "cannot be float16, which represents no values below 6e-8, so the gradients would underflow to 0. Use "
                "bfloat16 or float32"
            )
        return value

    @model_validator(mode="after")
    def fits(self) -> "ModelConfig":
        if self.shard and (self.quantize != "none" or self.compile):
            other = "compile = true" if self.compile else f"quantize = {self.quantize}"
            raise ValueError(f"shard = true cannot be combined with {other}. Use one of the two.")
        return self


class PromptsConfig(Section):
    lines: Lines = Field(
        default=(),
        description="Training prompts: a text with one per line, or a list; a JSON object has metadata, as in jsonl "
        "files.",
    )
    file: Path | None = Field(
        default=None,
        description="Prompts in addition to lines, one per line: text (# starts a comment), jsonl with metadata for "
        'rewards ({"prompt": ..., "tag": ...}), or CSV with a column prompt.',
    )
    negative: str = Field(default="", description="Negative prompt for classifier-free guidance.")

    def collect(self) -> list[str]:
        """The prompts of `lines`, then of `file` if it exists, without blank lines and comments."""
        prompts = parse_lines(list(self.lines))
        return prompts + read_prompt_file(self.file) if self.file is not None and self.file.is_file() else prompts

    def read(self) -> list[str]:
        """As `collect`. Raises ConfigError if the file is missing or broken, or there are no prompts."""
        if self.file is not None and not self.file.is_file():
            raise ConfigError(f"prompts.file {self.file} does not exist. Give a text file with one prompt per line.")
        prompts = self.collect()
        if not prompts:
            source = f"{self.file} contains" if self.file else "prompts.lines and prompts.file contain"
            raise ConfigError(f"{source} no prompts, but training needs at least one. Write one prompt per line.")
        return prompts


class RolloutConfig(Section):
    prompts_per_update: int = Field(default=4, ge=1, le=100_000, description="Prompts drawn for each update.")
    group_size: int = Field(
        default=8, ge=2, le=10_000, description="Images per prompt; advantages are relative to this group."
    )
    steps: int = Field(default=10, ge=2, le=1000, description="Denoising steps.")
    method: MethodName = Field(
        default="auto",
        description="Stochastic sampler; auto selects ddim for epsilon models and flow_sde for flow models.",
    )
    noise_level: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="Noise level (eta) of the sampler; default: the method's published value, 0 for awm and nft.",
    )
    sigma: Sigma = Field(default="native", description="How the standard deviation of each ddim step is chosen.")
    target_weight: float | None = Field(
        default=None, gt=0, le=1e6, description="Target credit weight w* for sigma = paper or uniform."
    )
    cfg: float = Field(
        default=1.0, ge=0, le=30, description="Classifier-free guidance scale during training; 1 disables guidance."
    )
    detach_unconditional: bool = Field(
        default=False, description="Stop gradients through the unconditional branch (Flow-GRPO)."
    )
    batch_cfg: bool = Field(
        default=True,
        description="Run both guidance branches in one model call; false takes two, with half the activations.",
    )
    shared_noise: bool = Field(
        default=False, description="Start every image of a group from the same initial noise (DanceGRPO)."
    )
    branch: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Number of stochastic steps at which the images of a group diverge; the deterministic steps before "
        "them are shared and computed once. 0 makes every step stochastic.",
    )
    branch_first: int = Field(
        default=0, ge=0, le=1000, description="Branch only at one of the first k trainable steps; 0 allows every step."
    )
    branch_points: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Groups per prompt, branching at different steps of a shared trajectory.",
    )
    policy: Literal["latest", "ema"] = Field(
        default="latest",
        description="Weights used for sampling: latest, or ema (needs optimizer.ema_decay; awm and nft only).",
    )
    decode: Literal["final", "predicted"] = Field(
        default="final",
        description="Latent that becomes the image: the last one, or the clean latent that the last step predicts "
        "(DanceGRPO).",
    )
    sde_window: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Length of the random contiguous SDE window; 0 = every step is stochastic.",
    )
    guidance: float = Field(
        default=3.5, ge=0, le=30, description="Guidance input of distilled models such as FLUX.1-dev."
    )
    shift: float | None = Field(
        default=None, gt=0, le=20, description="Timestep shift of flow models; default: the scheduler's own."
    )
    images_at_once: int = Field(
        default=16, ge=1, le=100_000, description="Images per model call; lower this if memory runs out."
    )
    height: int | None = Field(
        default=None, ge=8, le=16384, description="Image height in pixels; default: the model's native size."
    )
    width: int | None = Field(
        default=None, ge=8, le=16384, description="Image width in pixels; default: the model's native size."
    )


class AdvantageConfig(Section):
    kind: Literal["group", "window"] = Field(
        default="group", description="Baseline of the advantages: the image's group, or the prompt's recent rewards."
    )
    spread: Literal["group", "batch"] = Field(
        default="group", description="Normalise by the standard deviation of each group or of the whole batch."
    )
    clip: float = Field(default=5.0, gt=0, le=1e6, description="Clip advantages to this many standard deviations.")
    window: int = Field(
        default=32, ge=2, le=1_000_000, description="Recent rewards kept per prompt when kind = window."
    )
    min_count: int = Field(
        default=16, ge=2, le=1_000_000, description="Use batch statistics until a prompt has this many rewards."
    )


class ObjectiveConfig(Section):
    name: ObjectiveName = Field(
        default="log_hinge",
        description="Training objective; log_hinge is PCPO's. awm and nft train on re-noised final images instead of "
        "the sampled trajectory; credit and form do not apply to them.",
    )
    credit: CreditName = Field(
        default="proportionate",
        description="Credit weight of each denoising step in the loss; proportionate is PCPO's.",
    )
    form: FormName = Field(default="exact", description="How the credit weight enters the log-ratio.")
    clip_range: float = Field(default=1e-3, gt=0, lt=1, description="PPO-style clip range of a step's ratio.")
    nft_beta: float = Field(
        default=1.0, gt=0, le=1, description="nft: beta of the implicit positive and negative policies."
    )
    kl_weight: float = Field(default=0.0, ge=0, le=1e6, description="Weight of the KL penalty towards the base model.")
    kl_images: int = Field(
        default=4, ge=0, le=1_000_000, description="Images per update used to monitor the KL when kl_weight is 0."
    )
    kl_every: int = Field(
        default=10,
        ge=1,
        le=1_000_000,
        description="Updates between measurements of the KL when kl_weight is 0; each costs model calls.",
    )
    kl_mask: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Replaces the clip: drop terms whose KL to the old policy exceeds this and whose gradient would "
        "increase it (Flow-DPPO; 1e-5 is usual); 0 keeps the clip.",
    )
    train_steps: float = Field(
        default=1.0, gt=0, le=1, description="Fraction of the denoising steps trained in each update."
    )
    last_step: bool = Field(default=False, description="Also train the last denoising step, which most methods skip.")
    first_steps: int = Field(
        default=0, ge=0, le=1000, description="Train only the first k denoising steps; 0 trains all."
    )
    skip_last: int | None = Field(
        default=None, ge=0, le=1000, description="Leave out the last k denoising steps; if unset, last_step decides."
    )
    loss_weight: LossWeightName = Field(
        default="none", description="Factor on each step's loss, outside the clip; tempflow is TempFlow-GRPO's."
    )
    rescale_credit: bool = Field(
        default=True,
        description="Rescale the credit to the sum of the native weights; false keeps GRPO-Guard's published constant "
        "and is meant for credit = guard_dt.",
    )
    shared_noise: bool = Field(
        default=False,
        description="awm and nft: use the same noise for all images of a group.",
    )
    levels: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="awm and nft: train this many stratified random noise levels per update; 0 trains all.",
    )
    level_credit: Literal["uniform", "proportionate"] = Field(
        default="uniform",
        description="awm and nft: weight of each noise level; proportionate weights a level by its step's time.",
    )
    likelihood: LikelihoodName = Field(
        default="uniform", description="awm: weight of a sample's likelihood; adaptive divides by its mean error."
    )

    @property
    def skipped(self) -> int:
        """How many of the last denoising steps are not trained."""
        return int(not self.last_step) if self.skip_last is None else self.skip_last


class LoraConfig(Section):
    rank: int = Field(default=8, ge=1, le=1024, description="Rank of the LoRA.")
    alpha: float | None = Field(
        default=None, gt=0, le=1e6, description="LoRA alpha; default: the rank, for a scale of 1."
    )
    targets: Literal["attention", "linear", "all"] = Field(
        default="linear",
        description="Layers to adapt: attention; linear adds feed-forward layers; all adds convolutions.",
    )
    start: Path | None = Field(default=None, description="LoRA file to start training from.")

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """Scale of the up factor, alpha / rank."""
        return self.effective_alpha / self.rank


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw8bit"] = Field(
        default="adamw",
        description="Optimizer; adamw8bit keeps the moments of large tensors in 8 bits (needs bitsandbytes).",
    )
    learning_rate: float = Field(default=3e-4, gt=0, le=1, description="Learning rate of AdamW.")
    minibatches: int = Field(
        default=2, ge=1, le=10_000, description="Optimizer steps per update; each uses an equal share of every group."
    )
    epochs: int = Field(default=1, ge=1, le=1000, description="Passes over the images of each update.")
    weight_decay: float = Field(default=1e-4, ge=0, le=10, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="Gradient clipping norm.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of AdamW's second moment.")
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="EMA decay of the LoRA weights; the saved LoRA is the EMA. 0 disables it.",
    )
    ema_every: int = Field(default=8, ge=1, le=1_000_000, description="Optimizer steps between EMA updates.")
