"""Noise levels of a run: DDIM alphas, flow grids and the resolution shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["ddim", "flow"]
Spacing = Literal["leading", "trailing"]


@dataclass(frozen=True, eq=False)
class Grid:
    """The noise levels of a run, from noise to image.

    levels (T + 1,) float64: alpha_bar for `ddim`, t of x_t = (1 - t) x0 + t eps for `flow`.
    timesteps (T,): what the model is told; int64 for `ddim`, float64 1000 t for `flow`.
    """

    kind: Kind
    levels: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        if self.kind not in ("ddim", "flow"):
            raise ValueError(f"grid kind is {self.kind!r}, but a grid is 'ddim' or 'flow'.")
        if self.levels.ndim != 1 or len(self.levels) < 2 or len(self.levels) != len(self.timesteps) + 1:
            raise ValueError(
                f"the grid has {tuple(self.levels.shape)} levels and {tuple(self.timesteps.shape)} timesteps, "
                "but T steps join T + 1 levels. Give one more level than timesteps."
            )
        _check_levels(self.kind, self.levels)

    @property
    def steps(self) -> int:
        """The number of denoising steps T."""
        return len(self.timesteps)

    @property
    def dt(self) -> Tensor:
        """The share of the trajectory that each step covers, (T,) float64: t - t' for flow, 1 / T for ddim.

        PCPO (arXiv 2509.25774): ddim steps are even in the model's own time, so its proportionate credit is constant.
        """
        if self.kind == "ddim":
            return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64)
        return self.levels[:-1] - self.levels[1:]


def _check_levels(kind: Kind, levels: Tensor) -> None:
    """Refuse levels outside [0, 1] or that do not run from noise to image, (T + 1,)."""
    low, high = levels.min().item(), levels.max().item()
    if not (torch.isfinite(levels).all() and low >= 0 and high <= 1):
        raise ValueError(f"levels span {low:g} to {high:g}, but a noise level lies in [0, 1]. Check the schedule.")
    change = levels.diff() if kind == "ddim" else -levels.diff()
    if (change <= 0).any():
        first = int((change <= 0).nonzero()[0])
        way = "rise (alpha_bar)" if kind == "ddim" else "fall (t)"
        raise ValueError(
            f"level {first + 1} is {levels[first + 1]:g} after {levels[first]:g}, but {kind} levels {way} strictly "
            "from noise to image. Sort them and drop repeats."
        )


def shifted(u: Tensor, m: float) -> Tensor:
    """Resolution shift of flow times towards noise, (T,) -> (T,).

    SD3 (arXiv 2403.03206), Equation 23:  shift_m(u) = m u / (1 + (m - 1) u)
    """
    return m * u / (1 + (m - 1) * u)


def scaled_linear_alphas(num_train: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """alpha_bar of Stable Diffusion's training schedule, -> (num_train,) float64.

    LDM (arXiv 2112.10752):  alpha_bar_t = prod_{s <= t} (1 - beta_s),  sqrt(beta) linear in s
    """
    root = torch.linspace(beta_start**0.5, beta_end**0.5, num_train, dtype=torch.float64)
    return (1 - root.square()).cumprod(0)


def ddim_grid(
    steps: int,
    alphas_cumprod: Tensor | None = None,
    num_train: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
    spacing: Spacing = "leading",
) -> Grid:
    """The DDIM grid, levels (T + 1,) of alpha_bar.

    DDIM (arXiv 2010.02502), Section 4.2, spaced as diffusers' DDIMScheduler, `spacing` as in Table 2 of 2305.08891:
    leading t_i = offset + i * (num_train // steps), trailing t_i = round(num_train - i * num_train / steps) - 1, from
    pure noise. The last step goes to t - num_train // steps; below 0 that is alpha_bar_0, or 1 with `set_alpha_to_one`.
    """
    if not 1 <= steps <= num_train:
        raise ValueError(f"steps is {steps}, but the model has {num_train} timesteps. Use 1 to {num_train}.")
    alphas = (
        scaled_linear_alphas(num_train, beta_start, beta_end) if alphas_cumprod is None else alphas_cumprod.double()
    )
    if len(alphas) != num_train:
        raise ValueError(f"alphas_cumprod has {len(alphas)} entries, but num_train is {num_train}. Make them equal.")
    times = _ddim_times(steps, num_train, steps_offset, spacing)
    if times[0] >= num_train:
        raise ValueError(
            f"the first timestep is {int(times[0])}, but the model ends at {num_train - 1}. Use fewer steps."
        )
    if alphas[times[0]] == 0:
        raise ValueError(
            f"alpha_bar is 0 at the first timestep {int(times[0])} (zero terminal SNR), from which no ddim step leads. "
            "Set timestep_spacing = leading in the configuration of the model's scheduler."
        )
    previous = int(times[-1]) - num_train // steps
    if times[-1] == 0 and not set_alpha_to_one:
        raise ValueError(
            f"the last of {steps} timesteps is 0, from which no step leads to alpha_bar_0. Use fewer steps, "
            "steps_offset = 1 or set_alpha_to_one = true."
        )
    final = alphas.new_ones(1) if set_alpha_to_one and previous < 0 else alphas[max(previous, 0)].reshape(1)
    return Grid("ddim", torch.cat([alphas[times], final]), times)


def _ddim_times(steps: int, num_train: int, offset: int, spacing: Spacing) -> Tensor:
    """The timesteps of a DDIM grid, (T,) int64."""
    if spacing == "leading":
        return torch.arange(steps - 1, -1, -1) * (num_train // steps) + offset
    if spacing == "trailing":  # numpy's sums, whose rounding the scheduler has
        return torch.from_numpy(np.arange(num_train, 0, -num_train / steps)[:steps].round()).long() - 1
    raise ValueError(f"spacing is {spacing!r}, but ddim steps are spaced leading or trailing. Use one of these.")


def flow_grid(steps: int, shift: float = 3.0) -> Grid:
    """The ideal flow grid shift_m(linspace(1, 0, T + 1)), levels (T + 1,) of t.

    DanceGRPO (arXiv 2505.07818), code:  sigma_schedule = sd3_time_shift(shift, linspace(1, 0, T + 1))
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but a run has at least one step. Use 1 or more (16 is usual).")
    if not shift > 0:
        raise ValueError(f"shift is {shift}, but the shift is a positive factor. Use 1 for none, 3 for SD3 and FLUX.")
    return flow_grid_from_sigmas(shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift))


def flow_grid_from_sigmas(sigmas: Tensor | Sequence[float]) -> Grid:
    """A flow grid from the sigmas a scheduler really uses, the trailing 0 included, levels (T + 1,) of t."""
    levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or levels[-1] != 0:
        raise ValueError(
            f"sigmas have shape {tuple(levels.shape)} and end at {levels.flatten()[-1:].tolist()}, but a flow rollout "
            "joins at least two levels and ends at 0. Append the trailing 0."
        )
    return Grid("flow", levels, 1000 * levels[:-1])
