"""Rewards, prompts, schemas and loading of the pack, in process."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()

import torch  # noqa: E402

from comfyui_pcpo.reward.base import Reward, RewardSettings  # noqa: E402

pytestmark = pytest.mark.slow

comfy_host.load_pack()
ConfigError = comfy_host.pack_module("trainer.config.schema").ConfigError
types = comfy_host.pack_module("nodes.types")
scored = comfy_host.pack_module("nodes.rewards").scored
run = comfy_host.execute


def test_scores_put_the_best_first():
    reward = run("PCPOLoadReward", "redness")[0]
    images = torch.zeros(3, 64, 64, 3)
    images[1, ..., 0] = 1.0
    images[2, ..., 0] = 0.5
    best, scores, report, grid = run("PCPOScoreImages", images, reward, "", 2)
    assert torch.equal(best, images[[1, 2]])
    assert scores == sorted(scores, reverse=True) and len(scores) == 2
    assert report.count("\n") == 3 and grid.shape[0] == 1


def test_rewards_score_on_their_device_and_leave_it():
    """Also one that a training has moved to the CPU; ComfyUI does not know of the memory that a reward takes."""
    used = []

    class Recording(Reward):
        name = "recording"

        def score_batch(self, images, prompts):
            used.append(self.device.type)
            return torch.zeros(len(images))

    reward = Recording(RewardSettings(device="meta")).to("cpu")
    run("PCPOScoreImages", torch.rand(2, 8, 8, 3), types.WeightedRewards((reward,), (1.0,)), "", 0)
    assert used == ["meta"] and reward.device.type == "cpu"


def test_a_missing_weight_file_is_told_with_a_command_that_works_in_this_host():
    reward = run("PCPOLoadReward", "hpsv2")[0]
    command = f'run: "{sys.executable}" "{comfy_host.PACK / "trainer"}" download hpsv2 --folder "/'
    with pytest.raises(Exception, match=re.escape(command)):
        run("PCPOScoreImages", torch.rand(1, 8, 8, 3), reward, "a fox", 0)


class Forgetful(Reward):
    """Brightness; fails for dark images, and can say why."""

    name = "forgetful"
    reason = "it was too dark"

    def score_batch(self, images, prompts):
        bright = images.float().mean((1, 2, 3)) / 255
        if (bright < 0.5).any():
            self.failure = self.reason
        return bright.where(bright >= 0.5, torch.nan)


def test_failed_scores_are_told_with_their_reason():
    forgetful, images = Forgetful(), torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 8, 8, 3)
    reward = types.WeightedRewards((forgetful,), (1.0,))
    _, scores, report, _ = run("PCPOScoreImages", images, reward, "", 0)
    assert scores[0] > 0.7 and report.splitlines()[-1] == "1 of 2 forgetful scores failed (it was too dark)."
    with pytest.raises(ConfigError, match=r"^2 of 2 forgetful scores failed \(it was too dark\)\. Fix the"):
        run("PCPOScoreImages", images[[0, 0]], reward, "", 0)
    assert len(run("PCPOScoreImages", images[[1, 1]], reward, "", 0)[2].splitlines()) == 3
    forgetful.reason = ""
    with pytest.raises(ConfigError, match=r"scores failed \(NaN or infinite\)"):  # not the reason of an earlier time
        run("PCPOScoreImages", images[[0, 0]], reward, "", 0)


def test_a_reward_of_weight_0_that_fails_is_told_beside_the_scores():
    redness, forgetful = run("PCPOLoadReward", "redness")[0], types.WeightedRewards((Forgetful(),), (1.0,))
    both = run("PCPOCombineRewards", redness, 1.0, forgetful, 0.0)[0]
    _, scores, report, _ = run("PCPOScoreImages", torch.zeros(2, 8, 8, 3), both, "", 0)
    assert all(math.isfinite(score) for score in scores)
    assert report.splitlines()[-1] == "2 of 2 forgetful scores failed (it was too dark)."


def test_a_prompt_that_the_reward_cannot_score_is_refused_with_the_reason():
    ocr, images = run("PCPOLoadReward", "ocr")[0], torch.rand(2, 8, 8, 3)
    with pytest.raises(ConfigError, match="the prompt 'a fox' has no text in double quotes"):
        run("PCPOScoreImages", images, ocr, "a fox", 0)


def test_combined_rewards_add_up_and_refuse_repeats():
    a, b = run("PCPOLoadReward", "redness")[0], run("PCPOLoadReward", "colorfulness")[0]
    both = run("PCPOCombineRewards", a, 2.0, b, -1.0)[0]
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    total, *parts = (scored(reward, images, ["", ""])[0].total for reward in (both, a, b))
    assert torch.allclose(total, 2 * parts[0] - parts[1])
    with pytest.raises(ValueError, match="must be unique"):
        run("PCPOCombineRewards", both, 1.0, a, 1.0)


def test_a_chained_combination_takes_standardise_of_the_last_node_and_warns_if_another_differs(caplog):
    a, b, c = (run("PCPOLoadReward", name)[0] for name in ("redness", "colorfulness", "jpeg_compressibility"))
    raw, scaled = (run("PCPOCombineRewards", a, 1.0, b, 1.0, standardise)[0] for standardise in (False, True))
    with caplog.at_level("WARNING", "pcpo"):
        assert run("PCPOCombineRewards", scaled, 1.0, c, 1.0, True)[0].standardise
        single = run("PCPOCombineRewards", types.WeightedRewards(c.rewards, (1.0,), False), 1.0, b, 1.0, True)[0]
        assert single.standardise and not caplog.records  # of a single reward nothing is standardised
        assert run("PCPOCombineRewards", c, 1.0, raw, 1.0, True)[0].standardise
        assert not run("PCPOCombineRewards", scaled, 1.0, c, 1.0, False)[0].standardise
    first, second = caplog.messages
    assert first.startswith("PCPO: reward_b combines 2 rewards with standardise off, but here it is on")
    assert second.startswith("PCPO: reward_a combines 2 rewards with standardise on, but here it is off")


def test_prompts_refuse_an_empty_list():
    clip = run("PCPOLoadTinyModel", "emoji-flow")[1]
    assert run("PCPOPrompts", clip, "a fox\n\n# no\n a frog ")[0].lines == ("a fox", "a frog")
    with pytest.raises(ConfigError, match="no prompts"):
        run("PCPOPrompts", clip, " \n# nothing")


def test_schemas_equal_the_golden_file():
    """Ids never change and inputs are only appended; intended changes go into the file."""
    golden = json.loads((comfy_host.PACK / "tests/golden/nodes.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(comfy_host.schemas())) == golden


def test_train_lora_shows_at_most_nine_widgets():
    widgets = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    inputs = comfy_host.load_pack()["PCPOTrainLoRA"].GET_SCHEMA().inputs
    assert len([i.id for i in inputs if i.get_io_type() in widgets and not i.advanced]) <= 9


def test_english_texts_equal_the_schemas():
    texts = json.loads((comfy_host.PACK / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(comfy_host.texts())) == texts


def test_the_pack_does_nothing_where_comfyui_does_not_load_it():
    import importlib.util

    spec = importlib.util.spec_from_file_location("a_test_runner", comfy_host.PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "comfy_entrypoint" not in vars(module)


LOAD = """
import asyncio, gc, sys, time
host, plain, pack = sys.argv[1:]
sys.argv, sys.path[:0] = sys.argv[:1], [host]
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes, comfy.sd, comfy_api.latest, latent_preview
assert asyncio.run(nodes.load_custom_node(plain))
gc.collect(), gc.freeze()  # else a collection of all that the host has loaded may fall into the measured time
before, start = set(sys.modules), time.process_time()
assert asyncio.run(nodes.load_custom_node(pack))
print(time.process_time() - start, *sorted({n.split(".")[0] for n in set(sys.modules) - before}))
"""


def load_in_a_fresh_host(folder):
    """CPU seconds of loading this pack after a pack without nodes, and the libraries that it imports."""
    plain = folder / "plain"
    if not plain.is_dir():
        plain.mkdir()
        (plain / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
        (plain / "pyproject.toml").write_bytes((comfy_host.PACK / "pyproject.toml").read_bytes())
    command = [sys.executable, "-c", LOAD, comfy_host.COMFYUI, str(plain), str(comfy_host.PACK)]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, *names = done.stdout.splitlines()[-1].split()
    return float(seconds), set(names)


def test_loading_the_pack_is_quick_and_imports_nothing_heavy(tmp_path):
    """The first load writes bytecode, as after an installation; the others measure later starts."""
    loads = [load_in_a_fresh_host(tmp_path) for _ in range(3)]
    heavy = {"diffusers", "transformers", "open_clip", "peft", "accelerate", "cyclopts", "tensorboard", "matplotlib"}
    assert not loads[0][1] & heavy
    assert min(seconds for seconds, _ in loads[1:]) < 0.1
