"""Bad inputs of every command: exit status 2, a clear message, nothing changed on disk, and soon."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from bad_inputs import SMALL, Place, refused, table

from trainer.cli.main import main
from trainer.config.options import known_keys
from trainer.config.schema import Config
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

NUMBERS = ["nan", "inf", "-1000000000", "1e30", "many", "[1]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one update."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *SMALL, "--run.folder", str(folder), "--run.name", "done"]) == 0
    return folder / "done"


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def field_of(key: str) -> Any:
    section, name = key.split(".")
    return Config.model_fields[section].annotation.model_fields[name]  # pyright: ignore[reportOptionalMemberAccess]


def kinds(key: str) -> set[Any]:
    annotation = field_of(key).annotation
    return {annotation, *get_args(annotation)}


def configuration_values():
    """For every option of `train` and `check`, values that it cannot have."""
    for key in known_keys():
        found = kinds(key)
        values = NUMBERS if found & {int, float} and key != "reward.weights" else []
        values = ["maybe", "2"] if bool in found else values
        if get_origin(field_of(key).annotation) is Literal:
            values = ["nothing-like-this", "7", "[]"]
        for value in values:
            yield pytest.param(key, value, id=f"{key}-{value}")


@pytest.mark.parametrize(("key", "value"), configuration_values())
def test_a_value_that_an_option_cannot_have_is_refused_by_name(tmp_path, capsys, key, value):
    command = "check" if len(key) % 2 else "train"
    refused([command, *SMALL, "--run.folder", tmp_path / "runs", flag(key), value], re.escape(key), tmp_path, capsys)


FILES = {
    "missing": (lambda p: p.folder / "gone.toml", "gone.toml does not exist"),
    "folder": (lambda p: p.folder, "does not exist|is a folder"),
    "binary": (lambda p: p.file("a.toml", b"\xff\x00\x80"), "a.toml is not text"),
    "cut UTF-16": (lambda p: p.file("a.toml", "[run]".encode("utf-16")[:-1]), "a.toml is not text"),
    "no TOML": (lambda p: p.file("a.toml", "updates: 3"), "a.toml is not TOML"),
    "unknown section": (lambda p: p.file("a.toml", "[runn]\nupdates = 3"), "unknown key runn"),
    "unknown key": (
        lambda p: p.file("a.toml", "[run]\nupdate = 3"),
        "unknown key run.update. Did you mean run.updates",
    ),
    "stray key": (lambda p: p.file("a.toml", "seed = 5"), "unknown key seed. Did you mean run.seed"),
    "stray key beside auto": (
        lambda p: p.file("a.toml", 'name = "x"\n[rollout]\nsteps = "auto"'),
        "unknown key name. Did you mean",
    ),
    "switch for a number": (lambda p: p.file("a.toml", "[guard]\nevery = true"), "every.*must be a number"),
    "number for a section": (lambda p: p.file("a.toml", "run = 3"), "a.toml.*run"),
    "list for a section": (lambda p: p.file("a.toml", "run = [1]"), "a.toml.*run"),
    "table for a number": (lambda p: p.file("a.toml", "[run]\nseed = {a = 1}"), "run.seed"),
    "date for a number": (lambda p: p.file("a.toml", "[run]\nseed = 2020-01-01"), "run.seed"),
    "nested too deeply": (lambda p: p.file("a.toml", "a = " + "[" * 5000), "a.toml"),
    "doubled key": (lambda p: p.file("a.toml", "[run]\nseed = 1\nseed = 2"), "a.toml is not TOML"),
}
PROMPTS = {
    "missing": (lambda p: p.folder / "gone.txt", "gone.txt does not exist"),
    "folder": (lambda p: p.folder, "prompts.file .* does not exist|folder"),
    "empty": (lambda p: p.file("p.txt"), "p.txt contains no prompts"),
    "comments only": (lambda p: p.file("p.txt", "# one\n\n# two"), "p.txt contains no prompts"),
    "Latin-1": (lambda p: p.file("p.txt", b"caf\xe9"), "p.txt is not text"),
    "binary": (lambda p: p.file("p.txt", b"a\x00b"), "p.txt contains NUL"),
}
MODELS = {
    "unknown": (lambda p: "nobody-has-this", "nobody-has-this"),
    "nearly": (lambda p: "emoji-flw", "Did you mean emoji-flow"),
    "empty": (lambda p: "", "model.name is empty"),
    "a path with dots": (lambda p: "./models/nothing", "there is no such folder"),
    "a deep path": (lambda p: "models/checkpoints/nothing", "there is no such folder"),
    "a path of Windows": (lambda p: r"C:\models\nothing", "there is no such folder"),
    "empty folder": (lambda p: p.folder, "could not be loaded: Error no file named model_index.json"),
    "text as checkpoint": (lambda p: p.file("m.safetensors", "no model"), "m.safetensors"),
    "empty checkpoint": (lambda p: p.file("m.safetensors"), "m.safetensors"),
    "foreign checkpoint": (lambda p: p.lora("m.safetensors", a=torch.zeros(2)), "m.safetensors"),
    "missing checkpoint": (lambda p: p.folder / "gone.safetensors", "gone.safetensors"),
}
LORAS = {
    "missing": (lambda p: p.folder / "gone.safetensors", "gone.safetensors does not exist"),
    "folder": (lambda p: p.folder, "is a folder. Give a LoRA file|is not a run: it has no config.toml"),
    "text": (lambda p: p.file("l.safetensors", "no LoRA"), "l.safetensors"),
    "empty": (lambda p: p.file("l.safetensors"), "l.safetensors"),
    "without tensors": (lambda p: p.lora("l.safetensors"), "l.safetensors"),
    "foreign keys": (lambda p: p.lora("l.safetensors", weight=torch.zeros(2, 2)), "l.safetensors|lora"),
}
REWARDS = {
    "unknown": ("colourfulness", "", "Did you mean colorfulness"),
    "without a class": ("my_rewards:", "", "is not module:Class"),
    "without a module": (":Mine", "", "is not module:Class"),
    "module that is missing": ("no_such_module:Mine", "", "cannot be imported .ModuleNotFoundError"),
    "class that is missing": ("my_rewards:Other", "class Mine: pass", "cannot be imported .AttributeError"),
    "syntax error": ("my_rewards:Mine", "class Mine(:", "cannot be imported .SyntaxError"),
    "raises at import": ("my_rewards:Mine", "1 / 0", "cannot be imported .ZeroDivisionError"),
    "exits at import": ("my_rewards:Mine", "import sys; sys.exit(3)", "cannot be imported .SystemExit"),
    "no reward": ("my_rewards:Mine", "class Mine: pass", "must be a subclass"),
    "without score_batch": ("my_rewards:Mine", "class Mine(Reward):\n name = 'mine'", "must define both"),
    "constructor raises": ("my_rewards:Mine", "class Mine(Base):\n def __init__(self, s): raise OSError('no')",
                           "reward mine cannot be constructed .OSError: no"),
    "constructor without settings": ("my_rewards:Mine", "class Mine(Base):\n def __init__(self): pass",
                                     "cannot be constructed"),
    "build raises": ("my_rewards:Mine", "class Mine(Base):\n def build(self): raise OSError('no disk')",
                     r"reward mine raised OSError: no disk \(my_rewards.py, line \d+\)"),
    "remote without an address": ("remote", "", "PCPO_REWARD_URL is not set"),
    "vlm without a model": ("vlm_yes", "", "PCPO_VLM_MODEL is not set"),
    "weights are missing": ("pickscore", "", "model.safetensors does not exist"),
}  # fmt: skip
SCORES = {
    "raises": ("raise KeyError('sky')", "reward mine raised KeyError: 'sky'"),
    "raises an OSError": ("raise OSError(28, 'No space left')", "reward mine raised OSError"),
    "exits": ("raise SystemExit(1)", "reward mine raised SystemExit"),
    "returns None": ("return None", "scores of type NoneType for"),
    "returns a list": ("return [1.0]", "scores of type list for"),
    "returns a number": ("return 1.0", "scores of type float for"),
    "returns a string": ("return 'good'", "scores of type str for"),
    "returns too many": ("return torch.zeros(99)", r"scores of shape \(99,\)"),
    "returns a matrix": ("return torch.zeros(len(prompts), 1)", r"scores of shape \(\d, 1\)"),
    "returns complex numbers": ("return torch.zeros(len(prompts), dtype=torch.cfloat)", "scores of shape"),
    "returns NaN": ("return torch.full((len(prompts),), float('nan'))", "NaN or infinite"),
    "returns infinity": ("return torch.full((len(prompts),), float('inf'))", "NaN or infinite"),
}
ADDRESSES = {
    "no URL": ("nonsense", "", "is not a server address"),
    "port that is none": ("http://127.0.0.1:port", "", "is not a server address"),
    "port beyond 65535": ("http://127.0.0.1:99999", "", "is not a server address"),
    "broken IPv6": ("http://[::1", "", "is not a server address"),
    "file": ("file:///etc/passwd", "", "is not a server address"),
    "password": ("http://user:word@127.0.0.1:1", "", "is not a server address"),
    "token with a line break": ("http://127.0.0.1:1", "a\nb", "visible ASCII"),
    "token beyond ASCII": ("http://127.0.0.1:1", "t\u00f6k", "visible ASCII"),
    "nobody listens": ("http://127.0.0.1:1", "token", "does not answer .ConnectionRefusedError"),
    "host that cannot exist": (f"http://{'a' * 80}..b", "token", "does not answer"),
}
BASE = """
import torch
from comfyui_pcpo.reward import Reward
class Base(Reward):
    name = "mine"
    def score_batch(self, images, prompts):
        return torch.zeros(len(prompts))
"""


@pytest.fixture
def place(tmp_path, finished):
    return Place(tmp_path, finished)


@pytest.fixture
def own_reward(place, monkeypatch):
    """own_reward(code): the module my_rewards with that code."""
    monkeypatch.syspath_prepend(place.folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for variable in ("PCPO_REWARD_URL", "PCPO_VLM_MODEL", "PCPO_VLM_URL"):
        monkeypatch.delenv(variable, raising=False)
    sys.modules.pop("my_rewards", None)
    yield lambda code: place.file("my_rewards.py", BASE + code)
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(("make", "words"), table(FILES))
def test_bad_configuration_files(place, capsys, command, make, words):
    refused([command, make(place), *place.train()[1:]], words, place.folder, capsys)


@pytest.mark.parametrize(("make", "words"), table(PROMPTS))
def test_bad_prompt_files(place, capsys, make, words):
    file = make(place)
    refused(place.train("--prompts.lines", "[]", "--prompts.file", file), words, place.folder, capsys)
    refused(place.evaluate("--prompts", file, source="emoji-flow"), words, place.folder, capsys)


@pytest.mark.parametrize(("make", "words"), table(MODELS))
def test_bad_models(place, capsys, make, words):
    refused(place.train("--model.name", make(place)), words, place.folder, capsys)


@pytest.mark.parametrize(("make", "words"), table(LORAS))
def test_bad_loras(place, capsys, make, words):
    file = make(place)
    refused(place.train("--lora.start", file), words, place.folder, capsys)
    refused(place.sample("--guide", f"{file}=1"), words, place.folder, capsys)


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(("name", "code", "words"), table(REWARDS))
def test_bad_rewards(place, capsys, own_reward, command, name, code, words):
    own_reward(code)
    folder = ["--reward.folder", place.folder / "weights"]
    refused(place.train("--reward.weights", name, *folder, command=command), words, place.folder, capsys)


@pytest.mark.parametrize(("body", "words"), table(SCORES))
def test_bad_scores(place, capsys, own_reward, body, words):
    own_reward(f"class Mine(Base):\n def score_batch(self, images, prompts):\n  {body}\n")
    image = place.image()
    refused(["score", image, "--reward", "my_rewards:Mine"], words, place.folder, capsys)
    refused(place.train("--reward.weights", "my_rewards:Mine"), words, place.folder, capsys)


@pytest.mark.parametrize(("url", "token", "words"), table(ADDRESSES))
def test_bad_addresses(place, capsys, monkeypatch, url, token, words):
    monkeypatch.setenv("PCPO_REWARD_URL", url)
    monkeypatch.setenv("PCPO_REWARD_TOKEN", token)
    refused(["score", place.image(), "--reward", "remote"], words, place.folder, capsys)
    refused(place.train("--reward.weights", "remote"), words, place.folder, capsys)


COMMANDS = {
    "no such command": (lambda p: ["trian"], "train"),
    "train: option without a value": (lambda p: ["train", "--run.updates"], "has no value"),
    "train: word instead of an option": (lambda p: p.train("updates", "3"), "is not an option"),
    "train: unknown option": (lambda p: p.train("--run.update", "3"), "Did you mean --run.updates"),
    "train: broken list": (lambda p: p.train("--prompts.lines", '["a fox"'), "neither TOML nor JSON"),
    "train: broken table": (lambda p: p.train("--reward.weights", "{alignment: 1"), "neither TOML nor JSON"),
    "train: weights of 0": (lambda p: p.train("--reward.weights", "{alignment = 0}"), "every weight is 0"),
    "train: weight of NaN": (lambda p: p.train("--reward.weights", "{alignment = nan}"), "finite"),
    "train: trained and held out": (lambda p: p.train("--reward.held-out", "colorfulness"), "both trained"),
    "train: held out twice": (lambda p: p.train("--reward.held-out", '["redness", "redness"]'), "twice"),
    "train: name of a device": (lambda p: p.train("--run.name", "con"), "Windows reserves"),
    "train: name with a slash": (lambda p: p.train("--run.name", "a/b"), "run.name"),
    "train: name with a dot at its end": (lambda p: p.train("--run.name", "a."), "run.name"),
    "train: name that is long": (lambda p: p.train("--run.name", "a" * 65), "run.name"),
    "train: empty name": (lambda p: p.train("--run.name", ""), "run.name"),
    "train: folder that is a file": (lambda p: p.train("--run.folder", p.file("f")), "f is a file, not a folder"),
    "train: run that exists": (lambda p: p.train("--run.folder", p.run().parent, "--run.name", "run"), "already holds"),
    "train: device": (lambda p: p.train("--model.device", "toaster"), "toaster is not a device"),
    "train: device of the reward": (lambda p: p.train("--reward.device", "cuda:99"), "cuda:99"),
    "train: minibatches": (lambda p: p.train("--optimizer.minibatches", "3"), "does not split"),
    "train: window": (lambda p: p.train("--rollout.sde-window", "9"), "longer than rollout.steps"),
    "train: sigma": (lambda p: p.train("--rollout.sigma", "paper"), "needs rollout.target_weight"),
    "train: no noise": (lambda p: p.train("--rollout.noise-level", "0"), "noise_level above 0"),
    "train: height": (lambda p: p.train("--rollout.height", "50"), "multiple of"),
    "train: size": (lambda p: p.train("--rollout.height", "4096"), "rollout.height 4096 is beyond"),
    "train: empty prompt list": (lambda p: p.train("--prompts.lines", "[]"), "no prompts"),
    "train: number as a prompt": (lambda p: p.train("--prompts.lines", "[3]"), "prompts.lines"),
    "resume: missing": (lambda p: ["resume", p.folder / "gone"], "gone"),
    "resume: file": (lambda p: ["resume", p.file("f")], "f is not a run: it has no config.toml"),
    "resume: no run": (lambda p: ["resume", p.folder], "not a run"),
    "resume: nothing": (lambda p: ["resume"], "RUN|requires|missing"),
    "resume: finished": (lambda p: ["resume", p.run()], "finished"),
    "resume: fewer updates": (lambda p: ["resume", p.run(), "--updates", "0"], "updates"),
    "resume: negative updates": (lambda p: ["resume", p.run(), "--updates", "-1"], "updates"),
    "resume: updates as a word": (lambda p: ["resume", p.run(), "--updates", "many"], "updates"),
    "resume: unknown checkpoint": (lambda p: ["resume", p.run(), "--checkpoint", "77", "--updates", "9"],
                                   "checkpoint 77"),
    "resume: checkpoint that is none": (lambda p: ["resume", p.run(), "--checkpoint", "oldest"], "oldest"),
    "resume: kept without a guard": (lambda p: ["resume", p.run(), "--checkpoint", "kept"], "guard"),
    "resume: empty configuration": (lambda p: ["resume", p.run(config_toml=b""), "--updates", "2"], "config.toml"),
    "resume: cut configuration": (lambda p: ["resume", p.run(config_toml=b"[mod"), "--updates", "2"], "config.toml"),
    "resume: binary configuration": (lambda p: ["resume", p.run(config_toml=b"\xff\x00"), "--updates", "2"],
                                     "config.toml"),
    "resume: without configuration": (lambda p: ["resume", p.run(config_toml=None), "--updates", "2"], "not a run"),
    "sample: unknown source": (lambda p: p.sample(source="emoji-flw"), "neither a run's folder"),
    "sample: folder that is no run": (lambda p: p.sample(source=p.folder), "not a run"),
    "sample: text as a LoRA": (lambda p: p.sample(source=p.file("l.safetensors", "no")), "l.safetensors"),
    "sample: LoRA of another tool": (lambda p: p.sample(source=p.lora(a=torch.zeros(1))),
                                     "does not record its base model"),
    "sample: without a prompt": (lambda p: ["sample", "emoji-flow"], "prompt"),
    "sample: steps 0": (lambda p: p.sample("--steps", 0), "--steps is 0"),
    "sample: steps many": (lambda p: p.sample("--steps", 10**9), "--steps is"),
    "sample: steps as a word": (lambda p: p.sample("--steps", "many"), "steps"),
    "sample: images 0": (lambda p: p.sample("--images", 0), "--images is 0"),
    "sample: images negative": (lambda p: p.sample("--images", -4), "--images is -4"),
    "sample: cfg nan": (lambda p: p.sample("--cfg", "nan"), "--cfg is nan"),
    "sample: cfg beyond": (lambda p: p.sample("--cfg", 1e9), "--cfg is"),
    "sample: noise infinite": (lambda p: p.sample("--noise-level", "inf"), "--noise-level is inf"),
    "sample: seed negative": (lambda p: p.sample("--seed", -1), "--seed is -1"),
    "sample: seed beyond": (lambda p: p.sample("--seed", 2**64), "--seed is"),
    "sample: suffix": (lambda p: p.sample("--out", p.folder / "x.xyz"), "suffix of an image"),
    "sample: folder as a file": (lambda p: p.sample("--out", Path(shutil.copytree(p.finished, p.folder / "d.png"))),
                                 "folder"),
    "sample: below a file": (lambda p: p.sample("--out", p.file("f") / "o.png"), "f is a file, not a folder"),
    "sample: guide without a weight": (lambda p: p.sample("--guide", "cats.safetensors"), "is not LORA=WEIGHT"),
    "sample: guide of NaN": (lambda p: p.sample("--guide", "cats.safetensors=nan"), "is not LORA=WEIGHT"),
    "sample: guide of a word": (lambda p: p.sample("--guide", "cats.safetensors=much"), "is not LORA=WEIGHT"),
    "sample: unknown option": (lambda p: p.sample("--promt", "a"), "--prompt"),
    "plot: nothing": (lambda p: ["plot"], "No run folders given"),
    "plot: missing": (lambda p: ["plot", p.folder / "gone"], "gone"),
    "plot: no run": (lambda p: ["plot", p.folder], "not a run"),
    "plot: file": (lambda p: ["plot", p.file("f")], "f is not a run: it has no config.toml"),
    "plot: suffix": (lambda p: ["plot", p.run(), "--out", p.folder / "x.xyz"], "suffix of an image"),
    "plot: no updates": (lambda p: ["plot", p.run(metrics_jsonl=b"")], "no finished updates"),
    "plot: no metrics": (lambda p: ["plot", p.run(metrics_jsonl=None)], "no finished updates"),
    "plot: binary metrics": (lambda p: ["plot", p.run(metrics_jsonl=b"\xff\xfe\x00{")],
                             "metrics.jsonl|no finished updates"),
    "plot: metrics of another program": (lambda p: ["plot", p.run(metrics_jsonl=b'{"a": 1}\n')], "no finished updates"),
    "plot: metrics that are a list": (lambda p: ["plot", p.run(metrics_jsonl=b"[1, 2]\n")], "no finished updates"),
    "export: missing": (lambda p: ["export", p.folder / "gone"], "gone"),
    "export: format": (lambda p: ["export", p.run(), "--format", "onnx"], "comfyui, diffusers, kohya"),
    "export: suffix": (lambda p: ["export", p.run(), "--out", p.folder / "l.pt"], "not a .safetensors file"),
    "export: config": (lambda p: ["export", p.run(), "--out", p.folder / "run" / "config.toml"],
                       "not a .safetensors file"),
    "export: checkpoint": (lambda p: ["export", p.run(), "--checkpoint", "9"], "checkpoint 9"),
    "export: damaged": (lambda p: ["export", p.run(checkpoints__000001__lora_safetensors=b"")],
                        "export|lora|damaged|not"),
    "export: own file": (lambda p: ["export", p.run(), "--out", p.folder / "run" / "lora.safetensors"],
                         "belongs to the run"),
    "evaluate: missing": (lambda p: p.evaluate(source="gone"), "neither a run's folder"),
    "evaluate: seeds 0": (lambda p: p.evaluate("--seeds", 0), "--seeds is 0"),
    "evaluate: images negative": (lambda p: p.evaluate("--images", -1), "--images is -1"),
    "evaluate: steps 0": (lambda p: p.evaluate("--steps", 0), "--steps is 0"),
    "evaluate: cfg nan": (lambda p: p.evaluate("--cfg", "nan"), "--cfg is nan"),
    "evaluate: one image": (lambda p: p.evaluate("--images", 1), "too few for statistics"),
    "evaluate: checkpoint": (lambda p: p.evaluate("--checkpoint", "9"), "checkpoint 9"),
    "evaluate: reward": (lambda p: p.evaluate("--rewards", "nothing-like-this"), "is not a known reward"),
    "evaluate: unknown suite": (lambda p: p.evaluate("--suite", "geneval"), "--suite"),
    "evaluate: suite and prompts": (lambda p: p.evaluate("--suite", "tinyeval", "--prompts", p.file("p.txt", "a fox")),
                                    "--suite tinyeval has its own prompts, but --prompts .*p.txt is given too"),
    "evaluate: prompt outside TinyEval": (lambda p: p.evaluate("--rewards", "tinyeval", "--prompts",
                                          p.file("p.txt", "a zebra")),
                                          "reward tinyeval: 'a zebra' is not a prompt"),
    "evaluate: reference missing": (lambda p: p.evaluate("--reference", p.folder / "gone"), "no images"),
    "evaluate: reference of one": (lambda p: p.evaluate("--reference", p.album()), "contains one image"),
    "evaluate: inception missing": (lambda p: p.evaluate("--inception", p.folder / "gone.pt"), "gone.pt"),
    "evaluate: inception of text": (lambda p: p.evaluate("--inception", p.file("i.pt", "no")), "i.pt"),
    "evaluate: dino missing": (lambda p: p.evaluate("--dino", p.folder / "gone"), "gone"),
    "evaluate: lpips missing": (lambda p: p.evaluate("--lpips", p.folder / "gone.pth"), "gone.pth"),
    "evaluate: out is a file": (lambda p: p.evaluate("--out", p.file("f")), "f is a file, not a folder"),
    "score: missing": (lambda p: ["score", p.folder / "gone.png", "--reward", "redness"], "gone.png does not exist"),
    "score: empty folder": (lambda p: ["score", p.folder], "contains no images"),
    "score: text": (lambda p: ["score", p.file("a.png", "no"), "--reward", "redness"], "a.png cannot be read"),
    "score: empty file": (lambda p: ["score", p.file("a.png"), "--reward", "redness"], "a.png cannot be read"),
    "score: reward": (lambda p: ["score", p.image(), "--reward", "rednes"], "Did you mean redness"),
    "score: device": (lambda p: ["score", p.image(), "--device", "toaster"], "toaster is not a device"),
    "score: precision": (lambda p: ["score", p.image(), "--precision", "int4"], "precision"),
    "download: unknown": (lambda p: ["download", "nothing-like-this"], "is not a known reward"),
    "download: module": (lambda p: ["download", "a:B"], "is not a known reward"),
    "download: endpoint": (lambda p: ["download", "aesthetic", "--folder", p.folder, "--endpoint",
                           "http://127.0.0.1:1"],
                           "could not be fetched"),
    "download: endpoint that is none": (lambda p: ["download", "aesthetic", "--folder", p.folder, "--endpoint", "x"],
                                        "could not be fetched"),
    "download: folder that is a file": (lambda p: ["download", "aesthetic", "--folder", p.file("f"), "--endpoint",
                                        "http://127.0.0.1:1"],
                                        "could not be fetched|f is a file, not a folder|Not a directory|File exists"),
    "serve-reward: no token": (lambda p: ["serve-reward", "redness"], "PCPO_REWARD_TOKEN has 0 characters"),
    "serve-reward: unknown": (lambda p: ["serve-reward", "rednes"], "Did you mean redness|PCPO_REWARD_TOKEN"),
    "demo: updates 0": (lambda p: ["demo", "--updates", 0, "--folder", p.folder], "run.updates"),
    "demo: name": (lambda p: ["demo", "--name", "a/b", "--folder", p.folder], "run.name"),
    "demo: reward": (lambda p: ["demo", "--reward", "polish", "--folder", p.folder], "--reward"),
    "demo: seed": (lambda p: ["demo", "--seed", -1, "--folder", p.folder], "run.seed"),
    "demo: folder that is a file": (lambda p: ["demo", "--updates", 1, "--folder", p.file("f")],
                                    "f is a file, not a folder"),
    "options: argument": (lambda p: ["options", "all"], "all"),
    "check: unknown": (lambda p: ["check", "--run.update", "3"], "Did you mean --run.updates"),
    "check: prompts": (lambda p: ["check"], "no prompts"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), table(COMMANDS))
def test_bad_arguments(place, capsys, monkeypatch, make, words):
    monkeypatch.delenv("PCPO_REWARD_TOKEN", raising=False)
    monkeypatch.chdir(place.folder)
    refused(make(place), words, place.folder, capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "99999"], "Cannot listen on 127.0.0.1:99999|port"),
        (["--port", "-1"], "Cannot listen|port"),
        (["--port", "http"], "port"),
        (["--host", "no.such.host.invalid"], "Cannot listen on no.such.host.invalid"),
        (["--host", f"{'a' * 80}..b"], "Cannot listen"),
        (["--host", "a\0b"], "has NUL"),
        (["--images-at-once", "0"], "images_at_once"),
        (["--images-at-once", "-3"], "images_at_once"),
        (["--device", "toaster"], "toaster is not a device"),
        (["--precision", "int4"], "precision"),
    ],
)
def test_bad_servers(place, capsys, monkeypatch, options, words):
    monkeypatch.setenv("PCPO_REWARD_TOKEN", "0123456789abcdef")
    refused(["serve-reward", "redness", *options], words, place.folder, capsys)


def test_a_folder_that_cannot_be_written_is_named(place, capsys):
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("permissions do not stop this user")
    (place.folder / "closed").mkdir(mode=0o500)
    refused(place.train("--run.folder", place.folder / "closed"), "closed", place.folder, capsys)


def test_records_of_the_suite_are_what_json_has(finished):
    """The rows that the cases above damage are JSON in the first place."""
    assert [json.loads(line)["update"] for line in RunFolder(finished).metrics_file.read_text().splitlines()] == [1]
