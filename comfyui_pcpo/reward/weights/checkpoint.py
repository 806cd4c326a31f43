"""Weight files: found in one folder, read without running code from them, loaded completely or not at all."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from comfyui_pcpo.reward.base import RewardError, RewardFile, RewardSettings


def file_path(folder: Path, file: RewardFile) -> Path:
    """Where a weight file lies: folder / last part of its hub name / its own name."""
    return folder / file.hub_id.split("/")[-1] / file.filename


def locate(settings: RewardSettings, file: RewardFile) -> Path:
    """The weight file on this machine, or an error that says where to get it and where to put it."""
    source = f"{file.filename} ({file.bytes / 1e9:.2f} GB, {file.licence}, from {file.hub_id})"
    if settings.folder is None:
        raise RewardError(f"No weight folder is set, but this reward needs {source}. Set the folder of reward weights.")
    path = file_path(settings.folder, file)
    if not path.is_file():
        raise RewardError(
            f"{path} does not exist, but this reward needs {source}. Put it there, "
            "as `python -m trainer download REWARD` does."
        )
    return path


def read_state(path: Path, file: RewardFile) -> dict[str, Tensor]:
    """The tensors of a .safetensors or pickled state dict, wrapped in {"state_dict": ...} or not."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise RewardError(
            f"{path} has {path.stat().st_size} bytes of about {file.bytes} and cannot be read as weights. "
            f"It is cut off or another file: delete it and get {file.filename} from {file.hub_id} again."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"{path} holds no state dict of tensors. Get {file.filename} from {file.hub_id}.")
    return state


def load_strict(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load every weight, or say how many do not fit."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & state.keys() if wanted[name] != state[name].shape)
    if missing or unknown or wrong:
        first = (missing + unknown + wrong)[0]
        raise RewardError(
            f"{path} lacks {len(missing)} weights, has {len(unknown)} too many and {len(wrong)} of another shape "
            f"(such as {first}), but all must fit. It is a file for another model: get the one this reward names."
        )
    model.load_state_dict(state, strict=True)


def without(state: Mapping[str, Tensor], endings: tuple[str, ...]) -> dict[str, Tensor]:
    """The state dict without the entries whose names end like this: buffers and heads that scoring never reads."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(endings)}
