"""`taste train` and `taste test`: votes, folders of liked and disliked images, files of pairs."""

import json

import pytest
import torch
from PIL import Image
from voters import Voter

from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.taste.human import Question
from comfyui_pcpo.taste.votes import VoteFolder
from tools.tiny.data import draw_scenes
from trainer.cli.main import main


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    return draw_scenes(160, seed=7).pixels.permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def files(drawings, tmp_path_factory):
    """Image files sorted by redness, most first."""
    folder = tmp_path_factory.mktemp("images")
    redness = load_reward("redness").score(drawings.float() / 255, [""] * len(drawings))
    paths = []
    for place, row in enumerate(redness.argsort(descending=True).tolist()):
        paths.append(folder / f"{place:03}.png")
        Image.fromarray(drawings[row].numpy()).save(paths[-1])
    return paths


def agreement(capsys, *arguments: object) -> float:
    assert main(["taste", "test", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["agreement"]


def linked(folder, files):
    folder.mkdir()
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write_pairs(path, pairs) -> None:
    path.write_text("better,worse\n" + "".join(f"{a},{b}\n" for a, b in pairs))


def test_liked_and_disliked_folders_become_a_reward(files, tmp_path, capsys):
    liked, disliked = linked(tmp_path / "yes", files[:60:2]), linked(tmp_path / "no", files[100::2])
    out = tmp_path / "mine.safetensors"
    assert main(["taste", "train", "--liked", str(liked), "--disliked", str(disliked), "--out", str(out)]) == 0
    assert "60 votes: agrees with" in capsys.readouterr().out
    write_pairs(tmp_path / "test.csv", zip(files[1:60:2], files[101::2], strict=True))
    assert agreement(capsys, out, "--pairs", tmp_path / "test.csv") > 0.8
    assert main(["score", str(files[0]), "--reward", str(out), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]["scores"][str(out)]
    assert main(["score", str(files[-1]), "--reward", str(out), "--json"]) == 0
    assert best > json.loads(capsys.readouterr().out)[0]["scores"][str(out)] + 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "utf-16"])
def test_pairs_from_a_file(files, tmp_path, capsys, kind):
    pairs, out = list(zip(files[:20], files[-20:], strict=True)), tmp_path / "t.safetensors"
    path = tmp_path / ("pairs.jsonl" if kind == "jsonl" else "pairs.csv")
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"better": str(a), "worse": str(b)}) for a, b in pairs))
    else:
        write_pairs(path, pairs)
        if kind == "utf-16":
            path.write_text(path.read_text(), encoding="utf-16")
    assert main(["taste", "train", "--pairs", str(path), "--out", str(out)]) == 0
    assert "20 votes" in capsys.readouterr().out and agreement(capsys, out, "--pairs", path) > 0.9


def test_votes_of_several_folders(drawings, tmp_path, capsys):
    reward, out = load_reward("redness"), tmp_path / "t.safetensors"
    voter = Voter(lambda images: reward.score(images.float() / 255, [""] * len(images)))
    for number in range(24):
        images = drawings[number * 5 : number * 5 + 5]
        reply = voter(Question("", "", images, "ranking", 1, 1, False, False))
        VoteFolder(tmp_path / str(number % 2)).add(images, "", reply.ranks)
    assert main(["taste", "train", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("24 votes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is no preference to learn from"),
        (["{tmp}/empty"], "There is no preference to learn from in"),
        (["{tmp}/empty", "{tmp}/typo"], "{tmp}/typo is not a folder of votes"),
        (["--liked", "{tmp}"], "one of the folders {tmp} contains no images"),
        (["--liked", "{images}"], "one of the folders is not given"),
        (["--pairs", "{tmp}/bad.csv"], "pair 1 does not name two images"),
        (["--pairs", "{tmp}/bad.jsonl"], "line 1 is not JSON"),
        (["--pairs", "{tmp}/gone.csv"], "gone.png does not exist"),
        (["--pairs", "{tmp}/missing.csv"], "No such file"),
        (["--out", "{tmp}/x.pt"], "does not end in .safetensors"),
        (["--encoder", "clip-vit-l-14", "--folder", "{tmp}"], "open_clip_model.safetensors"),
    ],
)
def test_bad_sources_are_explained(arguments, message, files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("left,right\na.png,b.png\n")
    (tmp_path / "bad.jsonl").write_text("{better}\n")
    (tmp_path / "gone.csv").write_text("better,worse\ngone.png,lost.png\n")
    fill = {"{tmp}": str(tmp_path), "{images}": str(files[0].parent)}

    def filled(text: str) -> str:
        for key, value in fill.items():
            text = text.replace(key, value)
        return text

    out = [] if "--out" in arguments else ["--out", str(tmp_path / "t.safetensors")]
    assert main(["taste", "train", *map(filled, arguments), *out]) == 2
    assert filled(message) in capsys.readouterr().err
    assert not (tmp_path / "t.safetensors").exists()
