"""Documents that people and programs write wrongly: JSON, CSV, votes, tastes, records; every command refuses them."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from bad_inputs import SMALL, Place, refused, table
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.cli.main import main
from trainer.evaluation import images

pytestmark = pytest.mark.slow

DEEP, HUGE = "[" * 100_000, "9" * 400


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one update, beside a taste and the images that it was learned from."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *SMALL, "--run.folder", str(folder), "--run.name", "done"]) == 0
    likes = [text for name in ("liked", "disliked") for text in (f"--{name}", str(album(folder / name, 6)))]
    assert main(["taste", "train", *likes, "--out", str(folder / "taste.safetensors")]) == 0
    return folder / "done"


def album(folder: Path, count: int, size: tuple[int, int] = (16, 16)) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.effect_noise(size, 50).convert("RGB").save(folder / f"{number}.png")
    return folder


def prompts(p: Place, content: str, name: str = "p.jsonl") -> list:
    return p.train("--prompts.lines", "[]", "--prompts.file", p.file(name, content))


def settings(p: Place, content: str) -> list:
    return ["train", p.file("c.toml", content), "--run.folder", p.folder / "runs"]


def likes(p: Place) -> list:
    return ["--liked", p.finished.parent / "liked", "--disliked", p.finished.parent / "disliked"]


def learn(p: Place, *options) -> list:
    out = [] if "--out" in options else ["--out", p.folder / "t.safetensors"]
    return ["taste", "train", *options, *out]


def votes(p: Place, content: str | bytes) -> list:
    (p.folder / "votes").mkdir()
    p.file("votes/votes.jsonl", content)
    return learn(p, p.folder / "votes")


def pairs(p: Place, content: str, name: str = "pairs.csv") -> list:
    p.image("a.png")
    shutil.copy(p.folder / "a.png", p.folder / "same.png")
    return learn(p, "--pairs", p.file(name, content))


def taste(p: Place, metadata: dict | None = None, **tensors: torch.Tensor) -> Path:
    """A taste of which something was changed."""
    with safe_open(p.finished.parent / "taste.safetensors", "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({**whole, **tensors}, p.folder / "t.safetensors", {**file.metadata(), **(metadata or {})})
    return p.folder / "t.safetensors"


def agrees(p: Place, file: Path) -> list:
    return ["taste", "test", file, *likes(p)]


def ab(p: Place, *options, a: int = 2, b: int = 2, size: tuple[int, int] = (16, 16)) -> list:
    out = [] if "--out" in options else ["--out", p.folder / "ab.json"]
    return ["ab", album(p.folder / "a", a), album(p.folder / "b", b, size), *out, *options]


def replaced(p: Place, name: str, content: str, *command) -> list:
    """A command on a run of which one file was replaced."""
    run = p.run()
    (run / name).write_text(content)
    return [command[0], run, *command[1:]]


def resumed(p: Place, name: str, content: str) -> list:
    return replaced(p, name, content, "resume", "--updates", 2)


VOTE = json.dumps({"group": "1", "prompt": "", "images": ["a.png", "b.png"], "ranks": [0, 1]})
CASES = {
    "jsonl: nested too deeply": (lambda p: prompts(p, f'{{"prompt": {DEEP}'), "line 1 is not JSON .it is nested"),
    "jsonl: broken": (lambda p: prompts(p, '{"prompt": "a"}\n{"prompt"'), "line 2 is not JSON"),
    "jsonl: without a prompt": (lambda p: prompts(p, '{"text": "a"}'), 'line 1 has no text under "prompt"'),
    "jsonl: number": (lambda p: prompts(p, "3"), 'line 1 has no text under "prompt"'),
    "jsonl: list": (lambda p: prompts(p, '["a"]'), 'line 1 has no text under "prompt"'),
    "jsonl: half a surrogate pair": (lambda p: prompts(p, '{"prompt": "a \\ud83d"}'), "line 1 has a broken character"),
    "jsonl: half a pair in metadata": (lambda p: prompts(p, '{"prompt": "a", "b": "\\ud83d"}'), "broken character"),
    "jsonl: NUL": (lambda p: prompts(p, '{"prompt": "a\\u0000b"}'), "line 1 has NUL"),
    "jsonl: huge number": (lambda p: prompts(p, f'{{"prompt": "a", "n": {"9" * 5000}}}'), "line 1 is not JSON"),
    "csv: quote left open": (lambda p: prompts(p, 'prompt,tag\n"a fox,x\na frog,y\n', "p.csv"), "p.csv is not CSV"),
    "csv: huge cell": (lambda p: prompts(p, f"prompt,tag\n{'a' * 200_000},x\n", "p.csv"), "p.csv is not CSV"),
    "csv: no prompt in any row": (lambda p: prompts(p, "prompt,tag\n,x\n", "p.csv"), "contains no prompts"),
    "option: half a surrogate pair": (lambda p: p.train("--prompts.lines", '["\\ud83d"]'), "prompts.lines.* broken"),
    "option: bytes that are not UTF-8": (lambda p: p.sample("--prompt", "caf\udce9"), "argument .* broken character"),
    "toml: NUL in a path": (lambda p: settings(p, '[run]\nfolder = "a\\u0000b"'), "run.folder has NUL"),
    "toml: NUL in prompts.file": (lambda p: settings(p, '[prompts]\nfile = "a\\u0000b"'), "prompts.file has NUL"),
    "toml: NUL in a list": (lambda p: settings(p, '[prompts]\nlines = ["a\\u0000b"]'), "prompts.lines.0 has NUL"),
    "empty run.folder": (lambda p: p.train("--run.folder", ""), "run.folder: is empty"),
    "schedule: beyond the range": (lambda p: p.train("--reward.schedule", "{colorfulness = [[1, 1e300]]}"),
                                   "reward.schedule.*less than or equal"),
    "schedule: NaN": (lambda p: p.train("--reward.schedule", "{colorfulness = [[1, nan]]}"), "finite"),
    "schedule: update 0": (lambda p: p.train("--reward.schedule", "{colorfulness = [[0, 1.0]]}"), "greater than"),
    "schedule: falling updates": (lambda p: p.train("--reward.schedule", "{colorfulness = [[5, 1.0], [1, 2.0]]}"),
                                  r"updates \[5, 1\], but needs one or more, rising"),
    "schedule: only 0": (lambda p: p.train("--reward.schedule", "{colorfulness = [[1, 0.0]]}"),
                         "every weight of the schedule is 0"),
    "schedule: of another reward": (lambda p: p.train("--reward.schedule", "{redness = [[1, 1.0]]}"), "redness"),
    "constraint: also trained": (lambda p: p.train("--reward.constraints", "colorfulness"), "named elsewhere"),
    "constraint: also held out": (lambda p: p.train("--reward.constraints", "redness", "--reward.held-out", "redness"),
                                  "named elsewhere"),
    "constraint: unknown": (lambda p: p.train("--reward.constraints", "rednes"), "Did you mean redness"),
    "guard: fixed weight and budget": (lambda p: p.train("--guard.kl-budget", 1e-3, "--objective.kl-weight", 0.1),
                                       "Set one of them to 0"),
    "auto: where nothing knows it": (lambda p: p.train("--run.updates", "auto"), "run.updates"),
    "auto: beside a number that is none": (lambda p: p.train("--rollout.images-at-once", "auto", "--rollout.cfg", "x"),
                                           "rollout.cfg"),
    "auto: device": (lambda p: p.train("--rollout.images-at-once", "auto", "--model.device", "toaster"), "toaster"),
    "auto: broken index of a model": (lambda p: p.train("--rollout.steps", "auto", "--model.name",
                                      p.file("model_index.json", DEEP).parent), "model_index.json is not JSON"),
    "votes: binary": (lambda p: votes(p, b"\xff\xfe\x00\n"), "line 1 is not a vote"),
    "votes: a list": (lambda p: votes(p, "[1]\n"), "line 1 is not a vote"),
    "votes: nested too deeply": (lambda p: votes(p, f"{VOTE}\n{DEEP}\n"), "line 2 is not a vote"),
    "votes: images are missing": (lambda p: votes(p, f"{VOTE}\n"), "a.png does not exist"),
    "pairs: nested too deeply": (lambda p: pairs(p, DEEP, "pairs.jsonl"), "line 1 is not JSON"),
    "pairs: quote left open": (lambda p: pairs(p, 'better,worse\n"a.png,a.png\n'), "pairs.csv is not CSV"),
    "pairs: huge cell": (lambda p: pairs(p, f"better,worse\n{'a' * 200_000},a.png\n"), "pairs.csv is not CSV"),
    "pairs: an image with itself": (lambda p: pairs(p, "better,worse\na.png,a.png\n"), "pair 1 compares a.png"),
    "pairs: equal images": (lambda p: pairs(p, "better,worse\n" + "a.png,same.png\n" * 8), "equal features"),
    "pairs: a folder": (lambda p: learn(p, "--pairs", p.folder), "cannot be read"),
    "liked and disliked share images": (lambda p: learn(p, "--liked", p.album(), "--disliked", p.folder / "album"),
                                        "1 images are both liked and disliked"),
    "taste: exists": (lambda p: learn(p, *likes(p), "--out", p.lora("x.safetensors", a=torch.zeros(1))),
                      "exists and is not overwritten"),
    "taste: over a run's LoRA": (lambda p: learn(p, *likes(p), "--out", p.run() / "lora.safetensors"),
                                 "exists and is not overwritten"),
    "taste: below a file": (lambda p: learn(p, *likes(p), "--out", p.file("f") / "t.safetensors"), "is a file"),
    "taste test: weight of another size": (lambda p: agrees(p, taste(p, weight=torch.zeros(3))), r"shape \(3,\)"),
    "taste test: weight of NaN": (lambda p: agrees(p, taste(p, bias=torch.tensor(torch.nan))), "NaN or infinite"),
    "taste test: several biases": (lambda p: agrees(p, taste(p, bias=torch.zeros(3))), "cannot be read as a taste"),
    "taste test: report": (lambda p: agrees(p, taste(p, {"report": DEEP})), "cannot be read as a taste"),
    "taste test: encoder": (lambda p: agrees(p, taste(p, {"encoder": "nope"})), "of nope, which cannot be loaded"),
    "train on a taste of another size": (lambda p: p.train("--reward.weights", taste(p, weight=torch.zeros(3))),
                                         "cannot be read as a taste"),
    "ab: exists": (lambda p: ab(p, "--out", p.file("ab.json", "mine")), "exists and is not overwritten"),
    "ab: below a file": (lambda p: ab(p, "--out", p.file("f") / "ab.json"), "is a file"),
    "ab: more pairs than images": (lambda p: ab(p, "--pairs", 3), "--pairs is 3, but there are 2"),
    "ab: other number": (lambda p: ab(p, b=3), "Give as many images of the same size"),
    "ab: other size": (lambda p: ab(p, size=(17, 16)), "Give as many images of the same size"),
    "ab: port": (lambda p: ab(p, "--port", 70000), "port below 65536"),
    "ab: side that is missing": (lambda p: ["ab", p.album(), p.folder / "gone", "--out", p.folder / "x.json"],
                                 "no folder of images"),
    "export: digit that is no number": (lambda p: ["export", p.run(), "--checkpoint", "\u00b2"], "is not in"),
    "resume: digit that is no number": (lambda p: ["resume", p.run(), "--checkpoint", "\u00b2", "--updates", 2],
                                        "is not in"),
    "resume: record nested too deeply": (lambda p: resumed(p, "run.json", DEEP), "run.json is damaged"),
    "resume: record without identity": (lambda p: resumed(p, "run.json", '{"identity": null}'), "run.json is damaged"),
    "resume: metrics nested too deeply": (lambda p: resumed(p, "metrics.jsonl", f"{DEEP}\n"), "lacks the row"),
    "resume: manifest nested too deeply": (lambda p: resumed(p, "checkpoints/000001/manifest.json", DEEP), "damaged"),
    "plot: metrics nested too deeply": (lambda p: replaced(p, "metrics.jsonl", f"{DEEP}\n", "plot"), "no finished"),
    "plot: number for a table": (lambda p: replaced(p, "metrics.jsonl", '{"update": 1, "rewards": 3}\n', "plot"),
                                 "no finished updates"),
    "plot: number without end": (lambda p: replaced(p, "metrics.jsonl", f'{{"update": 1, "a": {HUGE}}}\n', "plot"),
                                 "no finished updates"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), table(CASES))
def test_bad_documents(tmp_path, finished, capsys, make, words):
    place = Place(tmp_path, finished)
    refused(make(place), words, tmp_path, capsys)


def test_a_sample_that_needs_more_memory_than_there_is_says_so(tmp_path, finished, capsys, monkeypatch):
    monkeypatch.setattr(images, "sample_images", lambda *_: torch.empty(1 << 58))
    refused(Place(tmp_path, finished).sample(), "out of memory.*fewer images", tmp_path, capsys)


def test_a_port_in_use_is_named_before_anything_is_asked(tmp_path, finished, capsys):
    with socket.create_server(("127.0.0.1", 0)) as used:
        place = Place(tmp_path, finished)
        refused(ab(place, "--port", used.getsockname()[1]), "Cannot listen on port", tmp_path, capsys)


def test_a_named_pipe_is_no_file_and_holds_nothing_up(tmp_path, finished, capsys):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes")
    os.mkfifo(tmp_path / "pipe.png")
    place = Place(tmp_path, finished)
    refused(["score", tmp_path / "pipe.png", "--reward", "redness"], "does not exist", tmp_path, capsys)
    refused(place.train("--prompts.file", tmp_path / "pipe.png"), "does not exist", tmp_path, capsys)
    refused(["train", tmp_path / "pipe.png"], "does not exist", tmp_path, capsys)
