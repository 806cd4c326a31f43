"""Weight files: located in one folder, read without unpickling code, and loaded with strict keys."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from comfyui_pcpo.reward.base import RewardError, RewardFile, RewardSettings


def file_path(folder: Path, file: RewardFile) -> Path:
    """Path of a weight file: folder / last part of the hub id / file name."""
    return folder / file.hub_id.split("/")[-1] / file.filename


def locate(settings: RewardSettings, file: RewardFile, reward: str) -> Path:
    """Local path of a weight file of a reward. Raises RewardError with its source and destination if it is missing."""
    source = f"{file.filename} ({file.bytes / 1e9:.2f} GB, {file.licence}, from {file.hub_id})"
    if settings.folder is None:
        raise RewardError(f"No weight folder is set, but this reward needs {source}. Set the folder of reward weights.")
    path = file_path(settings.folder, file)
    if not path.is_file():
        raise RewardError(
            f"{path} does not exist, but this reward needs {source}. Put it there, or "
            f'{settings.download} {reward} --folder "{settings.folder}"'
        )
    return path


def read_state(path: Path, file: RewardFile) -> dict[str, Tensor]:
    """Tensors of a .safetensors or pickled state dict, bare or in {"state_dict": ...}. Raises RewardError otherwise."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises whatever its first wrong byte asks for
        raise RewardError(
            f"{path} has {path.stat().st_size} bytes of about {file.bytes} and cannot be read as weights. "
            f"It is truncated or another file: delete it and download {file.filename} from {file.hub_id} again."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"{path} contains no state dict of tensors. Download {file.filename} from {file.hub_id}.")
    return state


def load_strict(model: nn.Module, state: Mapping[str, Tensor], path: Path, assign: bool = False) -> None:
    """Load a state dict with strict keys and shapes. Raises RewardError with the number of mismatches.

    `assign` makes the tensors themselves the weights of a model that has none yet (on the meta device).
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & state.keys() if expected[name] != state[name].shape)
    if missing or unknown or wrong:
        first = (missing + unknown + wrong)[0]
        raise RewardError(
            f"{path} lacks {len(missing)} weights, has {len(unknown)} unknown ones and {len(wrong)} of another shape "
            f"(such as {first}). It is a file of another model: download the one that this reward names."
        )
    model.load_state_dict(state, strict=True, assign=assign)


def drop_suffixes(state: Mapping[str, Tensor], endings: tuple[str, ...]) -> dict[str, Tensor]:
    """The state dict without entries with these endings: buffers and heads that scoring does not use."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(endings)}
