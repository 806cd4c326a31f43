"""One checkpoint: the training state in a folder, with a manifest that is verified before anything is used."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfyui_pcpo.durable import Bytes, flush_folder, safetensors_parts, write_durably
from comfyui_pcpo.json_text import parse_json

from ..config.schema import ConfigError
from ..files import digest, digest_of
from ..loop.state import TrainingState
from ..memory.transfer import cloned
from ..policy.base import LoraPairs
from ..policy.lora_pairs import flat_pairs, load_pairs

LORA, EMA, OPTIMIZER, STATE, MANIFEST = (
    "lora.safetensors", "average.safetensors", "optimizer.pt", "state.json", "manifest.json",
)  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""AdamW's moments, in 32 and in 8 bits; each has the shape of its parameter."""


class Damaged(ConfigError):
    """A checkpoint that is not what its manifest records."""


class NoEma(ConfigError):
    """A checkpoint of a run without an EMA, for one that keeps an EMA."""


def write_checkpoint(state: TrainingState, folder: Path, lora_scale: float) -> LoraPairs:
    """Write into a new folder and flush it, -> the LoRA to use: the EMA if there is one. `lora_scale`: alpha / rank."""
    folder.mkdir(parents=True)
    pairs, rest = state.policy.lora(), {"update": state.done, "window": state.window.state_dict()}
    rest["lora_scale"] = lora_scale
    rest["constraints"] = {name: constraint.state_dict() for name, constraint in state.constraints.items()}
    tensors = {LORA: flat_pairs(pairs)}
    if state.ema is not None:
        with state.ema.in_place():
            pairs = state.policy.lora()
        tensors[EMA] = flat_pairs(pairs)
        rest["average_steps"] = state.ema.steps
    if state.kl_weight is not None:
        rest["kl_weight"] = state.kl_weight
    files = {name: safetensors_parts(content) for name, content in tensors.items()}
    files[OPTIMIZER] = [torch_bytes(cloned(state.optimizer.state_dict()))]
    files[STATE] = [json.dumps(rest).encode()]
    shapes = {name: {key: list(t.shape) for key, t in content.items()} for name, content in tensors.items()}
    manifest = {"update": state.done, "files": {n: digest(parts) for n, parts in files.items()}, "tensors": shapes}
    files[MANIFEST] = [json.dumps(manifest, indent=1).encode()]
    for name, parts in files.items():
        write_durably(folder / name, *parts)
    flush_folder(folder)
    return pairs


def torch_bytes(content: Any) -> Bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getbuffer()


def verify(folder: Path, *only: str) -> None:
    """Raise Damaged unless the files, or `only` some, are those of the manifest. Versions before 0.2 wrote none."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        recorded = {name: dict(entry) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        missing = [name for name in (LORA, OPTIMIZER, STATE) if not (folder / name).is_file()]
        if missing:
            raise Damaged(f"checkpoint {folder} is damaged: {missing[0]} is missing.") from None
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error}).") from None
    for name in only or recorded:
        file = folder / name
        if not file.is_file():
            raise Damaged(f"checkpoint {folder} is damaged: {name} is missing.")
        if digest_of(file) != recorded.get(name):
            raise Damaged(f"checkpoint {folder} is damaged: {name} is not the file that was saved (SHA-256).")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    folder: Path
    lora: LoraPairs
    ema: LoraPairs | None
    optimizer: dict[str, Any]
    rest: dict[str, Any]

    def restore(self, state: TrainingState) -> None:
        """Bring `state` to this checkpoint. Raises ConfigError, before anything is changed, where it does not fit."""
        self._require_fit(state)
        if state.ema is not None and self.ema is not None:
            state.policy.load_lora(self.ema)
            state.ema.restart(self.rest["average_steps"])
        state.policy.load_lora(self.lora)
        state.load_moments(self.optimizer)
        state.window.load_state_dict(self.rest["window"])
        for name, saved in self.rest.get("constraints", {}).items():
            if name in state.constraints:  # a constraint that was added later starts anew
                state.constraints[name].load_state_dict(saved)
        state.done = self.rest["update"]
        if state.kl_weight is not None:
            state.kl_weight = self.rest.get("kl_weight", state.kl_weight)  # missing where the budget is new

    def _require_fit(self, state: TrainingState) -> None:
        if state.ema is not None and self.ema is None:
            raise NoEma(
                f"checkpoint {self.folder} has no EMA, because optimizer.ema_decay was 0. Set it to 0 to resume, or "
                "start a new run from this one's LoRA with lora.start."
            )
        own, given = flat_pairs(state.policy.lora()), flat_pairs(self.lora)
        odd = sorted(own.keys() ^ given.keys()) or [name for name in own if own[name].shape != given[name].shape]
        if odd:
            shapes = [str(tuple(t[odd[0]].shape)) if odd[0] in t else "nothing" for t in (given, own)]
            raise ConfigError(
                f"checkpoint {self.folder} is of another LoRA: {len(odd)} factors differ, first {odd[0]} ({shapes[0]} "
                f"there, {shapes[1]} here). Set model, lora.rank and lora.targets back to the run's."
            )
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        if not fits(self.optimizer, parameters, state.optimizer):
            raise ConfigError(
                f"checkpoint {self.folder}: its {OPTIMIZER} belongs to another LoRA or another optimizer. Set lora and "
                "optimizer.name back to the run's, or use another checkpoint."
            )


def fits(saved: dict[str, Any], parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's state dict is of these parameters, moment by moment, and of this kind of optimizer."""
    try:
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        states = saved["state"]
        if len(indices) != len(parameters) or set(states) - set(indices):
            return False
        needed = set(MOMENTS[:2]) if isinstance(optimizer, torch.optim.AdamW) else set(MOMENTS[2:])
        for index, parameter in zip(indices, parameters, strict=True):
            moments = {key: t for key, t in states.get(index, {}).items() if key in MOMENTS}
            if moments and (moments.keys() != needed or any(t.shape != parameter.shape for t in moments.values())):
                return False
    except (AttributeError, KeyError, TypeError):
        return False
    return True


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint has in state.json."""
    return parse_json((folder / STATE).read_text(encoding="utf-8"))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of a folder that was verified. Raises Damaged where that was not possible and it is not intact."""
    try:
        rest = read_progress(folder)
        ema = load_pairs(folder / EMA) if "average_steps" in rest else None
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        return Checkpoint(folder, load_pairs(folder / LORA), ema, optimizer, rest)
    except Exception as error:  # torch raises a different error for each way in which a file can be broken
        raise Damaged(f"checkpoint {folder} is damaged ({type(error).__name__}: {error}).") from error
