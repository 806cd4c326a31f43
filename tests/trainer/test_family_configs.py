"""The shipped configurations of real models pass `check`, on a tiny model of the same family in their place."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch

from comfyui_pcpo.method.samplers import transitions
from trainer.cli.main import main
from trainer.config.loading import load
from trainer.policy.loading import make_policy

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = {
    "sd15-ddpo": "sd15",
    "sd15-dancegrpo": "sd15",
    "sd21": "sd21",
    "sdxl": "sdxl",
    "qwen-image": "qwen-image",
    "z-image": "z-image",
    "z-image-turbo": "z-image",
    "chroma": "chroma",
    "flux2-klein": "flux2-klein",
    "sd35-flow-grpo": "sd35",
    "flux-dance": "flux",
    "flux-dance-24gb": "flux",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_check_accepts_a_shipped_configuration(name, tmp_path, capsys):
    folder, side = tiny_pipelines.save(FAMILIES[name], tmp_path), str(tiny_pipelines.SIDE)
    stand_in = ["--model.name", str(folder), "--model.device", "cpu", "--rollout.height", side, "--rollout.width", side]
    assert main(["check", str(CONFIGS / f"{name}.toml"), *stand_in]) == 0
    shown, r = capsys.readouterr().out, load(CONFIGS / f"{name}.toml").rollout
    assert f"{r.prompts_per_update} prompts x {r.group_size} images" in shown
    assert f'name = "{name}"' in shown


def test_every_real_configuration_is_checked():
    assert {path.stem for path in CONFIGS.glob("*.toml") if not path.stem.startswith("tiny")} == set(FAMILIES)


def test_flux_dances_weights_are_the_papers(tmp_path):
    """PCPO's zeta for 12 dance_sde steps with eta .3 on DanceGRPO's grid: sum of weights over sum of dt."""
    config = load(CONFIGS / "flux-dance.toml", {
        "model": {"name": str(tiny_pipelines.save("flux", tmp_path)), "device": "cpu"},
        "rollout": {"height": tiny_pipelines.SIDE, "width": tiny_pipelines.SIDE}, "lora": {"rank": 1},
    })  # fmt: skip
    policy, r = make_policy(config), config.rollout
    grid = policy.grid(r.steps)
    weights = torch.tensor([step.weight for step in transitions(grid, r.method, r.noise_level)], dtype=torch.float64)
    assert float(weights.sum() / grid.dt.sum()) == pytest.approx(11.4841574422, abs=1e-9)
