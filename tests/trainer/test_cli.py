"""The command line: each command through `main`, its exit status, and the files it promises."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from comfyui_pcpo.tiny import pipelines
from trainer.cli.libraries import share_cores
from trainer.cli.main import main, version
from trainer.cli.progress import Bar
from trainer.evaluation.demo import DEMO_RECIPES
from trainer.runs.folder import RunFolder


def options(tmp_path, **more):
    """The smallest run's options; dots in names are written as double underscores."""
    small = {
        "model.device": "cpu",
        "prompts.lines": '["a fox", "a red star"]',
        "rollout.prompts-per-update": 1,
        "rollout.group-size": 2,
        "rollout.steps": 2,
        "reward.weights": "{colorfulness = 1.0}",
        "lora.rank": 2,
        "run.folder": tmp_path,
        "run.updates": 1,
        "run.save-every": 1,
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [text for key, value in small.items() for text in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one update, with TensorBoard; copy it before changing it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *options(folder, run__name="first", run__tensorboard="true")]) == 0
    return RunFolder(folder / "first")


def colors(picture: Image.Image) -> int:
    """How many there are: an empty picture has one."""
    return len(picture.convert("RGB").getcolors(1 << 24))


@pytest.fixture
def run(finished, tmp_path):
    return RunFolder(shutil.copytree(finished.path, tmp_path / "first"))


def test_train_leaves_the_whole_run_folder(finished):
    for file in (finished.config_file, finished.metrics_file, finished.lora_file, finished.log_file):
        assert file.stat().st_size > 0
    for picture in (finished.curves_file, finished.grids / "000001.jpg"):
        assert colors(Image.open(picture)) > 20
    saved = {"lora.safetensors", "optimizer.pt", "state.json", "manifest.json"}
    assert {p.name for p in finished.checkpoint().iterdir()} == saved
    assert list((finished.path / "tensorboard").glob("events.*"))


def test_the_last_line_of_a_run_is_its_loras_path(tmp_path, capsys):
    assert main(["train", *options(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str((tmp_path / "run" / "lora.safetensors").resolve())


def test_train_reads_a_file_and_lays_options_on_it(finished, tmp_path):
    arguments = ["--run.folder", str(tmp_path), "--run.name", "again", "--run.tensorboard", "false"]
    assert main(["train", str(finished.config_file), *arguments]) == 0
    again = RunFolder(tmp_path / "again")
    assert again.config().rollout == finished.config().rollout
    assert again.records()[0]["reward_mean"] == finished.records()[0]["reward_mean"]


def test_check_shows_the_arithmetic(tmp_path, capsys):
    arguments = options(tmp_path, rollout__prompts_per_update=3, rollout__group_size=4, rollout__steps=3)
    arguments = [a.replace("_", "-") if a.startswith("--") else a for a in arguments]
    assert main(["check", *arguments, "--objective.last-step", "true"]) == 0
    out = capsys.readouterr().out
    assert "3 prompts x 4 images = 12 images per update" in out
    assert "12 images x 3 trained of 3 steps = 36 transitions per update" in out
    assert main(["check", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget"]["images"] == 12
    assert found["config"]["rollout"]["group_size"] == 4
    assert not (tmp_path / "run").exists()


def test_options_lists_every_option(capsys):
    assert main(["options"]) == 0
    out = capsys.readouterr().out
    assert "--rollout.group-size" in out
    assert "[8]" in out


@pytest.mark.slow
def test_the_demos_help_has_the_updates_of_its_recipes(capsys):
    assert main(["demo", "--help"]) == 0
    recipes = ", ".join(f"{recipe.updates} for {reward}" for reward, recipe in DEMO_RECIPES.items())
    assert f"default: {recipes}" in " ".join(capsys.readouterr().out.replace("\u2502", " ").split())


def test_the_demo_ends_with_the_gain_and_what_it_made(tmp_path, capsys):
    assert main(["demo", "--updates", "1", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ("hard tasks", "tinyeval", "polish", "diversity")
    hard, trained, held, variety = (next(line for line in lines if line.startswith(f"  {name} ")) for name in names)
    assert hard.endswith(" points") and "% ->" in hard
    assert trained.endswith("(trained)") and held.endswith("(held out)") and variety.endswith(" x (higher is better)")
    for name in ("before_after.png", "curves.png", "lora.safetensors"):
        assert str((tmp_path / "demo" / name).resolve()) in " ".join(lines)
    before_after = Image.open(tmp_path / "demo" / "before_after.png")
    assert colors(before_after) > 1000
    assert main(["demo", "--updates", "1", "--folder", str(tmp_path), "--name", "demo"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_resume_goes_on_with_more_updates(run):
    assert main(["resume", str(run.path)]) == 2
    assert main(["resume", str(run.path), "--updates", "2"]) == 0
    assert run.checkpoints.numbers() == [1, 2]
    assert len(run.records()) == 2


def test_plot_draws_one_run_and_several(run, finished, tmp_path, capsys):
    assert main(["plot", str(run.path), "--out", str(tmp_path / "one.png")]) == 0
    assert main(["plot", str(run.path), str(finished.path), "--out", str(tmp_path / "two.png")]) == 0
    assert colors(Image.open(tmp_path / "one.png")) > 20 < colors(Image.open(tmp_path / "two.png"))
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    run.curves_file.unlink()
    assert main(["plot", str(run.path)]) == 0
    assert run.curves_file.exists()
    capsys.readouterr()
    assert main(["plot"]) == 2
    assert "No run folders given" in capsys.readouterr().err
    run.metrics_file.unlink()
    assert main(["plot", str(run.path)]) == 2
    assert "no finished updates" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
def test_export_writes_the_file_it_names(run, capsys, layout):
    assert main(["export", str(run.path), "--format", layout]) == 0
    path = run.path / f"lora-{layout}.safetensors"
    assert capsys.readouterr().out.strip() == str(path.resolve())
    assert path.stat().st_size > 0


def test_export_refuses_unknown_formats_and_damaged_checkpoints(run, capsys):
    assert main(["export", str(run.path), "--format", "onnx"]) == 2
    assert "comfyui, diffusers, kohya" in capsys.readouterr().err
    (run.checkpoint() / "lora.safetensors").write_bytes(b"cut")
    assert main(["export", str(run.path)]) == 2
    assert "lora.safetensors is not the file that was saved" in capsys.readouterr().err


def test_sample_compares_before_and_after(run, tmp_path):
    out = tmp_path / "both.png"
    arguments = ["--prompt", "a fox", "--steps", "2", "--images", "2"]
    assert main(["sample", str(run.path), *arguments, "--compare", "--out", str(out)]) == 0
    both = Image.open(out)
    guided = tmp_path / "guided.png"
    guide = ["--guide", f"{run.lora_file}=1.5", "--cfg", "2", "--negative", "a frog"]
    assert main(["sample", "emoji-flow", *arguments, *guide, "--out", str(guided)]) == 0
    alone = Image.open(guided)
    assert both.width > 1.5 * alone.width and both.height >= alone.height  # side by side
    assert colors(both) > 100 < colors(alone)


def test_idle_threads_spin_shortly_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "3000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("module", ["trainer.cli.main", "benchmarks.__main__"])
def test_the_command_lines_alone_do_not_import_torch(module):
    """So that OpenMP reads the variable of `share_cores`, which is set before."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0


def test_score_sorts_pictures_best_first(tmp_path, capsys):
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "a.png")
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "b.png")
    rewards = ["--reward", "jpeg_compressibility", "--reward", "colorfulness"]
    assert main(["score", str(tmp_path), *rewards, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"][-5:] for row in rows] == ["a.png", "b.png"]
    assert set(rows[0]["scores"]) == {"jpeg_compressibility", "colorfulness"}
    assert main(["score", str(tmp_path / "a.png"), *rewards]) == 0
    assert "a.png" in capsys.readouterr().out


def test_score_compares_the_images_of_a_folder_with_a_reward_of_groups(tmp_path, capsys):
    for name, color in (("a", "gray"), ("b", "gray"), ("c", "red")):
        Image.new("RGB", (128, 128), color).save(tmp_path / f"{name}.png")
    rewards = ["--reward", "tiny_diversity", "--reward", "redness"]
    assert main(["score", str(tmp_path), *rewards, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["file"].endswith("c.png") and list(rows[0]["scores"]) == ["tiny_diversity", "redness"]
    assert main(["score", str(tmp_path / "a.png"), *rewards]) == 2
    assert "tiny_diversity compares the images of a prompt, and " in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save(tmp_path / "d.png")
    assert main(["score", str(tmp_path), *rewards]) == 2
    assert "The images differ in size, but tiny_diversity compares them." in capsys.readouterr().err


def test_score_takes_the_folder_and_the_precision_of_the_weights(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ["score", str(tmp_path / "a.png"), "--reward", "hpsv2.1", "--folder", str(tmp_path / "weights")]
    assert main(arguments) == 2
    assert str(tmp_path / "weights" / "HPSv2" / "HPS_v2.1_compressed.pt") in capsys.readouterr().err
    assert main([*arguments, "--precision", "float8"]) == 2
    assert main([*arguments, "--device", "toaster"]) == 2
    assert "reward.device toaster is not a device" in capsys.readouterr().err


def test_score_names_what_it_cannot_read(tmp_path, capsys):
    assert main(["score", str(tmp_path)]) == 2
    assert "contains no images" in capsys.readouterr().err
    (tmp_path / "no.png").write_text("text")
    assert main(["score", str(tmp_path / "no.png"), "--reward", "colorfulness"]) == 2
    assert "no.png cannot be read as an image" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "no.png"), "--reward", "colourfulness"]) == 2
    assert "colorfulness" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without a GPU")
def test_a_gpu_that_is_missing_is_a_note_of_check_and_an_error_of_train(tmp_path, capsys):
    arguments = [*options(tmp_path), "--model.device", "cuda:99"]
    assert main(["check", *arguments]) == 0
    assert "note: model.device is cuda:99, but PyTorch finds no GPU; training needs one." in capsys.readouterr().err
    assert main(["train", *arguments]) == 2
    assert "error: model.device is cuda:99, but PyTorch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollout.group-sise", "4"], "Did you mean --rollout.group-size?"),
        (["--rollout.group-size", "5", "--optimizer.minibatches", "2"], "does not split"),
        (["--reward.weights", "{nonsense = 1}"], "nonsense"),
        (["--model.device", "toaster"], "toaster is not a device"),
        (["--prompts.lines", "[]"], "no prompts"),
        (["--run.name", "../up"], "run.name"),
        (["--lora.start", "gone.safetensors"], "gone.safetensors does not exist"),
        (["--rollout.height", "50"], "is not a multiple of"),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_what_cannot_run_exits_with_2_and_makes_no_folder(tmp_path, capsys, command, arguments, message):
    assert main([command, *options(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("emoji-flow/transformer/diffusion_pytorch_model.safetensors", "missing"),
        ("emoji-flow/transformer/diffusion_pytorch_model.safetensors", "truncated"),
        ("shared/vae/diffusion_pytorch_model.safetensors", "truncated"),
    ],
)
def test_a_missing_or_truncated_model_file_is_named(tmp_path, capsys, monkeypatch, file, damage):
    models = shutil.copytree(pipelines.MODELS, tmp_path / "models")
    broken = models / file
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:5000])
    monkeypatch.setattr(pipelines, "MODELS", models)
    assert main(["check", *options(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert str(broken.parent) in error
    assert broken.name in error


def test_a_mistyped_flag_of_a_small_command_names_the_nearest(capsys):
    assert main(["sample", "emoji-flow", "--promt", "a fox"]) == 2
    captured = capsys.readouterr()
    assert "--prompt" in captured.out + captured.err


def test_ctrl_c_before_the_first_update_says_that_nothing_was_saved(tmp_path, capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "tick", stop)
    assert main(["train", *options(tmp_path)]) == 130
    assert "nothing was kept" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_check_shows_what_it_can_and_then_names_all_that_is_missing(tmp_path, capsys):
    missing = ["--reward.held-out", '["pickscore"]', "--model.name", "nobody/nothing", "--run.name", "x"]
    assert main(["check", *missing]) == 2
    shown = capsys.readouterr()
    assert 'name = "nobody/nothing"' in shown.out
    assert "4 prompts x 8 images = 32 images per update" in shown.out
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert "PickScore_v1" in errors[0] and "no prompts" in errors[1]


def test_options_lists_the_choices(capsys):
    assert main(["options"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("--")}
    assert "One of attention, linear, all." in lines["--lora.targets"]
    assert lines["--model.compile"].endswith("[false]")
    assert lines["--reward.weights"].endswith("[{alignment = 1}]")


def test_sampling_twice_keeps_both_pictures(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("samples.png", "samples-2.png"):
        assert main(["sample", str(run.path), "--prompt", "a fox", "--steps", "2", "--images", "1"]) == 0
        assert capsys.readouterr().out.strip() == str((tmp_path / name).resolve())


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+", capsys.readouterr().out.strip()) and version() != "0.0.0"


def test_a_misspelt_embedded_model_gets_the_nearest(capsys):
    assert main(["sample", "emoji-flw", "--prompt", "a fox"]) == 2
    assert "emoji-flow" in capsys.readouterr().err
    assert main(["check", "--model.name", "emoji-flw", "--prompts.lines", "a fox"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean emoji-flow?" in error and "stacktrace" not in error and len(error) < 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0, but must be between 1 and 1,000"),
        (["--images", "0"], "--images is 0"),
        (["--cfg", "nan"], "--cfg is nan"),
        (["--noise-level", "inf"], "--noise-level is inf"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", "x.xyz"], "x.xyz does not have the suffix of an image"),
    ],
)
def test_values_of_sample_are_refused_before_any_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "emoji-flow", "--prompt", "a fox", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plot_and_export_refuse_files_of_the_wrong_kind_and_the_runs_own(run, capsys):
    config, lora = run.config_file.read_bytes(), run.lora_file.read_bytes()
    assert main(["plot", str(run.path), "--out", "curves.xyz"]) == 2
    assert "curves.xyz does not have the suffix of an image" in capsys.readouterr().err
    assert main(["export", str(run.path), "--out", str(run.config_file)]) == 2
    assert "config.toml is not a .safetensors file" in capsys.readouterr().err
    for own in (run.lora_file, run.checkpoint() / "lora.safetensors"):
        assert main(["export", str(run.path), "--out", str(own)]) == 2
        assert "belongs to the run itself" in capsys.readouterr().err
    assert (run.config_file.read_bytes(), run.lora_file.read_bytes()) == (config, lora)


def test_our_own_warnings_are_printed_in_one_line(run, tmp_path, capsys):
    """Keys of text encoders in a LoRA are left out with a warning."""
    file = tmp_path / "both.safetensors"
    extra = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{part}.weight": torch.zeros(1, 1) for part in ("up",)}
    save_file(load_file(run.lora_file) | extra, file)
    arguments = ["--prompt", "a fox", "--steps", "1", "--images", "1", "--out", str(tmp_path / "one.png")]
    assert main(["sample", "emoji-flow", "--guide", f"{file}=1", *arguments]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "text encoders" in warnings[0]


def test_check_prints_every_problem_last_and_as_json(tmp_path, capfd):
    arguments = [*options(tmp_path), "--reward.held-out", '["hpsv2.1", "pickscore"]', "--prompts.lines", "[]"]
    assert main(["check", *arguments]) == 2
    shown = capfd.readouterr()
    assert "memory on the model's device" in shown.out
    problems = [line.removeprefix("error: ") for line in shown.err.splitlines()]
    assert [word in line for word, line in zip(("HPS", "Pick", "no prompts"), problems, strict=True)] == [True] * 3
    assert main(["check", "--json", *arguments]) == 2
    assert json.loads(capfd.readouterr().out)["problems"] == problems


def test_check_notes_a_folder_that_a_run_cannot_have_here(run, tmp_path, capsys):
    taken = ["--run.folder", str(run.path.parent), "--run.name", run.path.name, "--prompts.lines", '["a fox"]']
    assert main(["check", *taken]) == 0
    assert "already holds a run" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["check", "--run.folder", str(tmp_path / "file" / "runs"), "--prompts.lines", '["a fox"]']) == 0
    assert "note: run.folder: " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed")
def test_help_needs_no_current_folder(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["options"]) == 0


def test_one_of_several_processes_tells_the_notes(tmp_path, monkeypatch, capsys):
    arguments = ["check", *options(tmp_path), "--objective.nft-beta", "0.5"]
    shown = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        main(arguments)
        shown.append("nft_beta has no effect" in capsys.readouterr().err)
    assert shown == [True, False]


def test_a_reward_of_the_current_folder_is_found(tmp_path, monkeypatch, capsys):
    """As `python -m trainer` finds it; the command `pcpo` has another first entry in sys.path."""
    code = "from comfyui_pcpo.reward import Reward\nclass Dark(Reward):\n    name = 'dark'\n"
    code += "    def score_batch(self, images, prompts):\n        return -images.float().flatten(1).mean(1)\n"
    (tmp_path / "rewards_found_here.py").write_text(code)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert main(["score", "a.png", "--reward", "rewards_found_here:Dark"]) == 0
    assert "a.png" in capsys.readouterr().out
