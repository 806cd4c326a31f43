"""`check` needs shapes only: its budget is that of the weights, and no weight is read."""

import original_layout
import pytest
import tiny_pipelines
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from trainer.config.schema import ConfigError
from trainer.memory.estimate import budget
from trainer.policy.loading import make_policy, make_shapes
from trainer.policy.shapes import pipeline_of_shapes
from trainer.runs.check import check_run

pytestmark = pytest.mark.slow

SIZE = {"height": tiny_pipelines.SIDE, "width": tiny_pipelines.SIDE}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd15", {}),
        ("sdxl", {"precision": "bfloat16"}),
        ("sd3", {}),
        ("flux", {"precision": "bfloat16", "quantize": "fp8"}),
        ("z-image", {"precision": "bfloat16"}),
    ],
)
def test_the_budget_of_shapes_is_that_of_the_weights(make_config, tmp_path, family, settings):
    folder = tiny_pipelines.save(family, tmp_path)
    config = make_config(str(folder), model=settings, rollout={**SIZE, "cfg": 2.0})
    policy = make_shapes(config)
    parts = [part for part in policy.pipeline.components.values() if isinstance(part, nn.Module)]
    own = {id(p) for p in policy.trainable()}
    assert all(isinstance(p, FakeTensor) for part in parts for p in part.parameters() if id(p) not in own)
    assert budget(policy, config) == budget(make_policy(config), config)


def test_a_list_among_the_pipelines_options_is_no_part(tmp_path):
    """Krea 2's index has the numbers of the text encoder's layers."""
    pipeline = pipeline_of_shapes(str(tiny_pipelines.save("krea2", tmp_path)), torch.bfloat16)
    assert pipeline.text_encoder_select_layers == (1, 2)
    assert all(isinstance(p, FakeTensor) for p in pipeline.transformer.parameters())


def test_a_checkpoint_file_is_checked_by_its_header(make_config, tmp_path):
    folder = tiny_pipelines.save("sd15", tmp_path)
    file = original_layout.write(tiny_pipelines.build("sd15"), tmp_path / "model.safetensors")
    config = make_config(str(file), model={"config": str(folder)}, rollout=SIZE)
    found, expected = (budget(make(config), config).memory.phases() for make in (make_shapes, make_policy))
    assert found == pytest.approx(expected, rel=2e-3)  # a few KB: weights of a file are laid out differently in memory
    file.write_bytes(file.read_bytes()[:-100])
    assert "is not an intact safetensors file" in check_run(config).problems[0]


@pytest.mark.parametrize("base", ["sd15", "models/pipelines/sd15", r"models\sd15", "~/sd15"])
def test_a_folder_of_configurations_that_does_not_exist_is_not_asked_of_the_hub(make_config, tmp_path, base):
    file = original_layout.write(tiny_pipelines.build("sd15"), tmp_path / "model.safetensors")
    config = make_config(str(file), model={"config": base}, rollout=SIZE)
    for make in (make_shapes, make_policy):
        with pytest.raises(ConfigError, match="is no folder"):
            make(config)


@pytest.mark.parametrize("damage", ["missing", "truncated", "another shape"])
def test_weight_files_that_cannot_be_loaded_are_named(make_config, tmp_path, damage):
    folder = tiny_pipelines.save("sd15", tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_bytes((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    message = {
        "missing": "has no weights",
        "truncated": "is not an intact",
        "another shape": r"lacks \d+ of \d+ weights",
    }
    with pytest.raises(ConfigError, match=message[damage]):
        make_shapes(make_config(str(folder), rollout=SIZE))


@pytest.mark.parametrize("family", ["qwen-image", "qwen-image-2.1"])
def test_models_that_look_at_masks_are_measured_by_shapes_too(make_config, tmp_path, family):
    """Prompts are cut, and the image's tokens found, by masks whose contents are known beside the shapes."""
    folder, side = tiny_pipelines.save(family, tmp_path), {"height": 64, "width": 64}
    config = make_config(str(folder), rollout={**side, "cfg": 2.0})
    policy = make_shapes(config)
    assert all(isinstance(p, FakeTensor) for p in policy.pipeline.text_encoder.parameters())
    found, expected = (budget(p, config).memory.phases() for p in (policy, make_policy(config)))
    assert found == pytest.approx(expected, rel=0.02)  # computing reuses a buffer now and then
