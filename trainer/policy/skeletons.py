"""Configuration of the pipelines that a checkpoint file can be loaded as with nothing else at hand: SD1.5 and SDXL.

The values are those of the published models. The CLIP vocabulary is read from open_clip, which ships it.
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
CLIP_G = {
    **CLIP_L,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL_UNET = {
    **UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}
SKELETONS: dict[str, dict[str, dict[str, Any]]] = {
    "StableDiffusionPipeline": {"scheduler": SCHEDULER, "vae": VAE, "text_encoder": CLIP_L, "unet": UNET},
    "StableDiffusionXLPipeline": {
        "scheduler": SCHEDULER,
        "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "unet": SDXL_UNET,
    },
}


def write_skeleton(pipeline: str, folder: Path, spacing: str = "leading") -> Path:
    """The pipeline's folder without weights, as from_single_file wants it, with the scheduler's timestep spacing."""
    parts = SKELETONS[pipeline]
    parts = {**parts, "scheduler": {**parts["scheduler"], "timestep_spacing": spacing}}
    tokenizers = {name.replace("text_encoder", "tokenizer"): name for name in parts if name.startswith("text_encoder")}
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, config in parts.items():
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        index[name] = [library, config.get("_class_name") or config["architectures"][0]]
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        _write(folder / name / file, config)
    for name in tokenizers:
        index[name] = ["transformers", "CLIPTokenizer"]
        _write_tokenizer(folder / name, pad=END if name == "tokenizer" else "!")
    _write(folder / "model_index.json", index)
    return folder


def clip_merges() -> list[str]:
    """CLIP's byte pairs, in order."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    return gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()[1 : MERGES + 1]


def byte_letters() -> list[str]:
    """The letter of each byte in CLIP's vocabulary: printable ones stand for themselves, and come first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def _write_tokenizer(folder: Path, pad: str) -> None:
    merges, letters = clip_merges(), byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, START, END])}
    _write(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END,
        "unk_token": END, "pad_token": pad,
    })  # fmt: skip


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
