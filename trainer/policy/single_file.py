"""One .safetensors checkpoint, as ComfyUI users have it, as a diffusers pipeline.

Of SD and SDXL files everything is used. Of SD3 and FLUX files only the transformer is, and the other parts come from a
pipeline's folder or the hub: they are the same in every checkpoint, and many files lack them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..config.presets import timestep_spacing
from ..config.schema import ConfigError
from ..config.text_files import read_object
from .skeletons import write_skeleton


@dataclass(frozen=True)
class CheckpointKind:
    """How to tell a checkpoint and what to load it as."""

    mark: str  # a key, or the start of one, that only this kind has
    pipeline: str
    denoiser: str
    base: str | None  # a pipeline on the hub with the parts that the file lacks


CHECKPOINT_KINDS = (
    CheckpointKind("conditioner.embedders.1.", "StableDiffusionXLPipeline", "unet", None),
    CheckpointKind("cond_stage_model.transformer.", "StableDiffusionPipeline", "unet", None),
    CheckpointKind("cond_stage_model.model.", "StableDiffusionPipeline", "unet", None),
    CheckpointKind("joint_blocks.0.x_block.attn2.", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
         "stabilityai/stable-diffusion-3.5-medium"),
    CheckpointKind("joint_blocks.37.", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
         "stabilityai/stable-diffusion-3.5-large"),
    CheckpointKind("joint_blocks.0.", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
         "stabilityai/stable-diffusion-3-medium-diffusers"),
    CheckpointKind("double_blocks.0.img_mod.", "FluxPipeline", "FluxTransformer2DModel",
         "black-forest-labs/FLUX.1-dev"),
)  # fmt: skip
SD2 = CHECKPOINT_KINDS[2]
SCHNELL = "black-forest-labs/FLUX.1-schnell"  # the FLUX.1 that takes no guidance
EDM = ("edm_mean", "edm_vpred.sigma_max")  # marks of Playground v2.5 and CosXL
SCALES = ("scale_weight", "weight_scale", "scaled_fp8", "comfy_quant")
PREFIX = "model.diffusion_model."
WIDE: dict[str, Any] = {"torch_dtype": torch.float32}  # else text encoders keep the file's precision


def precisions(dtype: torch.dtype) -> dict[str, Any]:
    """What diffusers is told of a pipeline's precision: `dtype`, and float32 for the VAE."""
    return WIDE if dtype == torch.float32 else {"torch_dtype": {"default": dtype, "vae": torch.float32}}


def checkpoint_plan(path: Path, base: str | None) -> tuple[CheckpointKind, str | None]:
    """A checkpoint's kind, and the pipeline that its other parts come from. Raises ConfigError for one not supported.

    None stands for the skeleton of its kind. Only the file's header is read.
    """
    keys = read_keys(path)
    kind = checkpoint_kind(keys, path)
    edm = [key for key in EDM if key in keys]
    if edm:
        raise ConfigError(
            f"{path} has {edm[0]}: its model is trained on EDM's noise levels, but SDXL's ddim steps have DDPM's. Use "
            "an SDXL checkpoint that predicts epsilon or v."
        )
    scales = [key for key in keys if key.endswith(SCALES)]
    if scales:
        raise ConfigError(
            f"{path} is quantised: {len(scales)} of its tensors are scales, such as {min(scales)}, which are not read. "
            "Give the model in bfloat16, float16 or float32."
        )
    if base is not None:
        check_base(base, kind)
    if kind.denoiser != "unet":
        distilled = kind.pipeline == "FluxPipeline" and not any("guidance_in." in key for key in keys)
        return kind, base or (SCHNELL if distilled else str(kind.base))
    if base is None and kind is SD2:
        raise ConfigError(
            f"{path} is an SD2 checkpoint, which does not say whether its model predicts epsilon or v. Set "
            "model.config to a folder or hub name of an SD2 pipeline, which has its prediction_type."
        )
    return kind, base


def load_checkpoint(path: Path, base: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a checkpoint; `base` is the folder or hub name of one of its kind. Raises ConfigError.

    SD and SDXL, which are small, are read in float32 whatever `dtype` is.
    """
    kind, source = checkpoint_plan(path, base)
    if kind.denoiser != "unet":
        return _with_transformer(path, kind, str(source), dtype)
    with TemporaryDirectory() as folder:
        pipeline = _whole(path, kind, source or str(checkpoint_skeleton(path, kind, Path(folder))))
    keys = read_keys(path)
    if "v_pred" in keys:  # the mark that trainers of SDXL v-prediction models leave, and ComfyUI reads
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr="ztsnr" in keys
        )
    return pipeline


def checkpoint_skeleton(path: Path, kind: CheckpointKind, folder: Path) -> Path:
    """The skeleton of a checkpoint's kind; the file's name says whether its model is distilled to a few steps."""
    return write_skeleton(kind.pipeline, folder, timestep_spacing(path.name))


def read_keys(path: Path) -> set[str]:
    """Names of a file's tensors."""
    if not path.is_file():
        raise ConfigError(f"model.name {path} does not exist. Give a checkpoint, a folder or a hub name.")
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ConfigError(f"{path} is not an intact safetensors file ({error}). Copy or download it again.") from None


def checkpoint_kind(keys: set[str], path: Path) -> CheckpointKind:
    """Which kind of checkpoint has these keys. Raises ConfigError for none of them."""
    bare = {key.removeprefix(PREFIX) for key in keys}
    for kind in CHECKPOINT_KINDS:
        if any(key.startswith(kind.mark) for key in bare):
            return kind
    if any("lora_" in key for key in keys):
        raise ConfigError(f"{path} is a LoRA, not a model. Give it as lora.start, and its model as model.name.")
    if any(key.startswith(("input_blocks.", "down_blocks.")) for key in bare):
        raise ConfigError(f"{path} is a UNet without text encoders. Give the whole checkpoint or a folder.")
    raise ConfigError(
        f"{path} holds {len(keys)} tensors, but none that identifies an SD1.x, SD2.x, SDXL, SD3.x or FLUX.1 "
        "checkpoint. Give one of these, or a folder or hub name of a diffusers pipeline."
    )


def is_hub_name(name: str) -> bool:
    """Whether this can be a repository on the hub: owner/name. All else is the path of a file or folder."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def check_base(base: str, kind: CheckpointKind) -> None:
    """Refuse what is no folder, no pipeline, or one of another kind; a hub name is left to diffusers."""
    import diffusers

    if not Path(base).is_dir():
        if not is_hub_name(base):
            raise ConfigError(
                f"model.config {base} is no folder. Give the folder of a diffusers pipeline, or a hub name: owner/name."
            )
        return
    if not (Path(base) / "model_index.json").is_file():
        raise ConfigError(f"model.config {base} has no model_index.json. Give a folder of a diffusers pipeline.")
    index: Any = diffusers.DiffusionPipeline.load_config(base)
    pipeline_class = index["_class_name"]
    if pipeline_class != kind.pipeline:
        raise ConfigError(
            f"model.config {base} is a {pipeline_class}, but the checkpoint is a {kind.pipeline}. Give one of those."
        )


def _whole(path: Path, kind: CheckpointKind, config: str) -> Any:
    import diffusers

    pipeline: Any = getattr(diffusers, kind.pipeline)
    if kind.pipeline == "StableDiffusionXLPipeline":
        return pipeline.from_single_file(str(path), config=config, add_watermarker=False, **WIDE)
    return pipeline.from_single_file(
        str(path), config=config, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **WIDE
    )


def _with_transformer(path: Path, kind: CheckpointKind, base: str, dtype: torch.dtype) -> Any:
    import diffusers

    model: Any = getattr(diffusers, kind.denoiser)
    transformer = model.from_single_file(str(path), config=base, subfolder="transformer", torch_dtype=dtype)
    pipeline: Any = getattr(diffusers, kind.pipeline)
    return pipeline.from_pretrained(base, transformer=transformer, **left_out(Path(base)), **precisions(dtype))


def left_out(folder: Path) -> dict[str, None]:
    """The parts that a folder was saved without, such as T5; diffusers wants to be told of them."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    return {name: None for name, kind in read_object(index).items() if kind == [None, None]}
