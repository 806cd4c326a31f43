"""`evaluate`: the same noise on both sides, every metric that its files allow, statistics over seeds, and errors."""

import json
import math
import shutil
import sys

import pytest
import torch
from PIL import Image
from running import start_run
from scipy import stats

from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.tinyeval import TASKS, suite, suite_prompts
from tests.golden import metric_recipe as recipe
from tests.golden import reward_recipe as gold
from tools.tiny.measure import drawn
from trainer.cli.main import main
from trainer.config.loading import build
from trainer.config.schema import ConfigError
from trainer.evaluation.demo import PAIRS_SHOWN, chosen
from trainer.evaluation.evaluate import configured, count_images, evaluate, set_reference
from trainer.evaluation.image_files import batches, image_files
from trainer.evaluation.metrics import DISTANCE, Meter, Networks, Tally, judged
from trainer.evaluation.options import EvaluationOptions
from trainer.evaluation.report import Metric
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.slow

PROMPTS = ["a fox", "two frogs"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of emoji-flow whose LoRA moves the pictures plainly."""
    torch.set_num_threads(1)
    tree = {
        "model": {"device": "cpu"},
        "prompts": {"lines": PROMPTS},
        "rollout": {"prompts_per_update": 1, "group_size": 2, "steps": 2},
        "reward": {"weights": {"colorfulness": 1.0}, "held_out": ["alignment"]},
        "objective": {"last_step": True},
        "optimizer": {"learning_rate": 0.05, "minibatches": 1},
        "lora": {"rank": 2},
        "run": {"folder": str(tmp_path_factory.mktemp("runs")), "updates": 2, "save_every": 1, "preview_every": 0},
    }
    folder, updates = start_run(build(tree, "test"))
    list(updates)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def small(**more):
    return EvaluationOptions(**({"seeds": 2, "images": 2, "steps": 2} | more))


@pytest.fixture(scope="module")
def report(run):
    return evaluate(str(run.path), small())


def metric(report, name) -> Metric:
    return next(m for m in report.metrics if m.name == name)


def test_the_runs_rewards_are_measured_and_their_roles_told(report):
    roles = {m.name: m.role for m in report.metrics}
    assert roles == {"colorfulness": "trained", "alignment": "held out", "tiny diversity": "variety"}
    for m in report.metrics:
        assert len(m.before) == len(m.after) == 2
        assert m.before != m.after and m.before[0] != m.before[1]


def test_before_is_the_model_alone_on_the_same_noise(report, prompts):
    alone = evaluate("emoji-flow", small(prompts=prompts, rewards=("colorfulness", "alignment")))
    for m in alone.metrics:
        assert m.before == pytest.approx(metric(report, m.name).before, rel=1e-4)
    assert not any(m.after for m in alone.metrics)
    assert metric(alone, "alignment").role == "reward"


def test_a_lora_file_is_its_run_and_a_checkpoint_is_not(run, report):
    found, first = evaluate(str(run.lora_file), small()), evaluate(str(run.path), small(checkpoint="1"))
    for m in report.metrics:
        assert metric(found, m.name).after == pytest.approx(m.after, rel=1e-4)
        assert metric(first, m.name).before == pytest.approx(m.before, rel=1e-4)
    assert metric(first, "colorfulness").after != metric(report, "colorfulness").after


def test_the_same_prompt_twice_is_two_images_and_each_is_shown_with_its_own_score(prompts):
    prompts.write_text("a fox\na fox\n")
    shown = evaluate("emoji-flow", small(prompts=prompts, seeds=1, rewards=("redness",))).shown["before"]
    first, second = shown.images
    assert not torch.equal(first, second)
    reward = load_reward("redness")
    assert shown.scores == pytest.approx([float(reward.score(images, [""])[0]) for images in (first, second)], abs=1e-5)


def test_noise_is_that_of_the_seed_alone(run, report):
    second = evaluate(str(run.path), small(seeds=1, first_seed=1))
    for m in second.metrics:
        assert (m.before, m.after) == (metric(report, m.name).before[1:], metric(report, m.name).after[1:])


def test_the_json_holds_the_statistics_of_the_seeds(report, tmp_path):
    files = report.write(tmp_path)
    assert [file.name for file in files] == ["evaluation.json", "evaluation.png", "before_after.png"]
    tree = json.loads(files[0].read_text())
    for name, found in tree["metrics"].items():
        before, after = found["before"]["seeds"], found["after"]["seeds"]
        assert (before, after) == (metric(report, name).before, metric(report, name).after)
        test = stats.ttest_rel(after, before)
        assert found["difference"]["p"] == pytest.approx(test.pvalue)
        assert found["after"]["standard_error"] == pytest.approx(stats.sem(after))
    assert tree["prompts"] == PROMPTS and tree["model"] == "emoji-flow" and tree["seeds"] == 2
    for file in files[1:]:
        assert len(Image.open(file).convert("RGB").getcolors(1 << 24)) > 20


def test_images_are_shown_of_prompts_from_all_over_the_list():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.evaluation.evaluate.MOST_SHOWN", 3)
        shown = evaluate("emoji-flow", small(suite="tinyeval", seeds=1)).shown["before"]
    tasks = list(suite().values())
    assert shown.prompts == [tasks[0][0], tasks[2][0], tasks[4][0]]
    assert len(shown.images) == len(shown.scores) == 3


def test_images_of_an_earlier_evaluation_are_replaced_once_all_new_ones_are_there(run, tmp_path):
    """Otherwise those of more seeds or prompts stay, and a folder of them is a reference for distances."""
    pictures = tmp_path / "pictures"
    for seeds in (2, 1):
        evaluate(str(run.path), small(seeds=seeds), pictures)
        assert [f.name for f in sorted((pictures / "after").iterdir())] == [str(seed) for seed in range(seeds)]
    with pytest.raises(ConfigError):
        evaluate(str(run.path), small(rewards=("nothing",)), pictures)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pictures"] and list(pictures.iterdir())


def test_an_evaluation_is_not_lost_where_its_folder_of_images_cannot_be_replaced(run, tmp_path):
    (tmp_path / "pictures").touch()  # a file in its place
    report = evaluate(str(run.path), small(), tmp_path / "pictures")
    partial = tmp_path / "pictures.partial"
    assert report.setup["pictures"] == str(partial) and len(list(partial.rglob("*.png"))) == 16
    assert f"the images are in {partial}, since {tmp_path / 'pictures'} could not be replaced" in "\n".join(
        report.notes
    )


def test_the_command_replaces_images_only_when_asked(run, tmp_path, capsys):
    arguments = ["evaluate", "emoji-flow", "--images", "1", "--seeds", "2", "--steps", "2", "--save-images"]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    (tmp_path / "prompts.txt").write_text("a fox")
    kept = tmp_path / "out" / "pictures" / "mine.png"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert main(arguments) == 2 and "pictures exists and is not overwritten" in capsys.readouterr().err
    assert kept.exists()
    assert main([*arguments, "--overwrite"]) == 0 and not kept.exists()


def test_one_image_per_seed_is_too_few_for_a_distance_and_said_before_sampling(run, tmp_path, prompts):
    prompts.write_text("a fox")
    with pytest.raises(ConfigError, match="one image per seed, but distances"):
        evaluate("emoji-flow", small(images=1, prompts=prompts, reference=reference(tmp_path)))


def reference(folder):
    """A folder of two images."""
    for name in "ab":
        Image.new("RGB", (128, 128), "red").save(folder / f"{name}.png")
    return folder


def test_a_metric_without_a_value_is_a_note_and_no_row(run):
    lone = evaluate(str(run.path), small(images=1, rewards=("redness", "tiny_diversity")))
    assert metric(lone, "tiny_diversity").before
    (note,) = (
        note for note in lone.notes if note.startswith("tiny_diversity has no value: a single image of a prompt")
    )
    assert note.endswith("generate two or more")
    assert not any("tiny_diversity" in line for line in lone.table())
    assert set(lone.draw()) == {"evaluation.png", "before_after.png"}


def test_the_table_has_a_line_for_every_metric(report):
    head, *lines = report.table()
    assert head.split() == ["metric", "before", "after", "difference", "p"]
    assert [line.split()[0] for line in lines] == ["colorfulness", "alignment", "tiny"]
    assert len({len(line) for line in (head, *lines)}) == 1
    assert Metric("FID", DISTANCE, [2.0], [1.0]).lower and not Metric("alignment", "", [2.0], [1.0]).lower
    assert Metric("x", "y", [2.0], [1.0]).row() == ("x (y)", "2.0000", "1.0000", "-1.0000", "-")


def test_the_frechet_distance_to_ones_own_pictures_is_zero(run, tmp_path):
    pictures = tmp_path / "pictures"
    evaluate(str(run.path), small(seeds=1, images=6), pictures)
    assert len(list((pictures / "before" / "0").glob("*.png"))) == 12
    found = evaluate(str(run.path), small(seeds=1, images=6, reference=pictures / "before"))
    distance = metric(found, "tiny FD")
    assert distance.before[0] == pytest.approx(0, abs=1e-5)
    assert distance.after[0] > 1e-2 and distance.lower
    assert f"12 images in {pictures / 'before'}" in found.notes


def test_every_network_that_is_named_adds_its_metric(run, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.save(recipe.weights(gold.golden("inception")["shapes"]), tmp_path / "inception.pth")
    torch.save(recipe.weights(gold.golden("lpips")["shapes"]), tmp_path / "alexnet.pth")
    torch.save(recipe.lpips_heads(), tmp_path / "alex.pth")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    (tmp_path / "real").mkdir()
    for name in recipe.IMAGE_SUFFIXES:  # three sizes
        Image.fromarray(gold.array(name)).save(tmp_path / "real" / f"{name}.png")
    options = small(
        seeds=1,
        reference=tmp_path / "real",
        rewards=("redness",),
        inception=tmp_path / "inception.pth",
        dino=tmp_path / "dino",
        lpips=tmp_path / "alexnet.pth",
    )
    found = evaluate(str(run.path), options)
    names = ["redness", "tiny FD", "tiny diversity", "FID", "FD-DINOv2", "Inception Score", "LPIPS diversity"]
    assert [m.name for m in found.metrics] == names
    assert all(math.isfinite(v) for m in found.metrics for v in (*m.before, *m.after))
    assert 1 <= metric(found, "Inception Score").before[0] <= 4


def test_measuring_piece_by_piece_is_measuring_at_once():
    images = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    meter = Meter({"alignment": load_reward("alignment")}, Networks({}))
    whole, parts = Tally(meter, 2), Tally(meter, 2)
    whole.add(images, ["a fox"] * 6)
    for piece in images.split(2):
        parts.add(piece, ["a fox"] * 2)
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-5)


def test_scores_that_fail_are_left_out_and_counted(run, tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "from comfyui_pcpo.reward import Reward\n"
        "class Picky(Reward):\n"
        "    name = 'picky'\n"
        "    def score_batch(self, images, prompts):\n"
        "        scores = images[:, 0, 0, 0].float()\n"
        "        scores[0] = float('nan')\n"
        "        return scores\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = evaluate(str(run.path), small(seeds=1, rewards=("picky:Picky",)))
    sys.modules.pop("picky")
    assert math.isfinite(metric(found, "picky:Picky").before[0])
    assert "2 scores of picky:Picky failed and were left out" in found.notes


def test_code_that_a_lora_file_names_is_not_imported(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "copy"))
    from safetensors.torch import load_file, save_file

    text = run.config_file.read_text().replace('held_out = [\n    "alignment",\n]', 'held_out = ["os:system"]')
    assert "os:system" in text
    save_file(load_file(copy.lora_file), copy.lora_file, {"pcpo.config": text})
    with pytest.raises(ConfigError, match=r"names code as a reward, os:system"):
        evaluate(str(copy.lora_file), small())


def test_pictures_of_one_size_are_read_together(tmp_path):
    for n, side in enumerate((4, 4, 4, 6, 4)):
        Image.new("RGB", (side, 4), (n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = [tuple(batch.shape[:3]) for batch in batches(image_files(tmp_path), 2)]
    assert found == [(2, 4, 4), (1, 4, 4), (1, 4, 6), (1, 4, 4)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"seeds": 0}, "--seeds is 0"),
        ({"images": 1, "seeds": 1}, "too few"),
        ({"steps": 1001}, "--steps is 1001, but must be between 1 and 1,000"),
        ({"cfg": math.nan}, "--cfg is nan"),
        ({"first_seed": -1}, "--first-seed is -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(run, more, said):
    with pytest.raises(ConfigError, match=said):
        small(**more)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "gone.txt"], "gone.txt does not exist"),
        (["--rewards", "hpsv2.1", "--folder", "gone"], "HPS_v2.1_compressed.pt does not exist"),
        (["--rewards", "hpsv9"], "'hpsv9' is not a known reward"),
        (["--reference", "gone"], "gone contains no images"),
        (["--inception", "gone.pth"], "published at https://github.com/toshas/torch-fidelity"),
        (["--dino", "gone"], "facebook/dinov2-large"),
        (["--lpips", "gone.pth"], "alexnet-owt-7be5be79.pth"),
        (["--checkpoint", "99"], "checkpoint 99 is not in"),
    ],
)
def test_what_cannot_be_evaluated_exits_with_2_and_writes_nothing(run, tmp_path, capsys, arguments, said):
    assert main(["evaluate", str(run.path), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_prints_table_notes_and_files(run, tmp_path, capsys):
    copy = shutil.copytree(run.path, tmp_path / "copy")
    arguments = ["evaluate", str(copy), "--rewards", "redness", "colorfulness", "--seeds", "2", "--images", "2"]
    assert main([*arguments, "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("redness (held out)") and lines[2].startswith("colorfulness (trained)")
    assert lines[-1] == str((copy / "evaluation" / "before_after.png").resolve())
    assert main([*arguments, "--steps", "2", "--json", "--out", str(tmp_path / "other")]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"redness", "colorfulness", "tiny diversity"}


def test_a_models_folder_is_evaluated_without_a_lora(tmp_path, prompts, capsys):
    from trainer.policy.loading import load_pipeline

    load_pipeline("emoji-flow").save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), "--prompts", str(prompts), "--rewards", "redness"]
    out = tmp_path / "out"
    assert count_images(str(tmp_path / "model"), small(prompts=prompts)) == 8
    assert main([*arguments, "--seeds", "2", "--images", "2", "--steps", "2", "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"evaluation.json", "samples.png"}
    assert capsys.readouterr().out.splitlines()[0].split() == ["metric", "before"]


@pytest.fixture(scope="module")
def by_suite(run):
    """The evaluation on one prompt of each task."""
    with pytest.MonkeyPatch.context() as patch:
        prompts = tuple(prompts[0] for prompts in suite().values())
        patch.setattr("trainer.evaluation.evaluate.suite_prompts", lambda: prompts)
        assert count_images(str(run.path), small(suite="tinyeval")) == 2 * 2 * 2 * len(TASKS)
        return evaluate(str(run.path), small(suite="tinyeval", rewards=("redness",)))


def test_the_suite_adds_the_share_of_right_images_by_task(by_suite):
    names = [f"TinyEval, {task}" for task in (*TASKS, "hard tasks", "all tasks")]
    assert [m.name for m in by_suite.metrics] == ["redness", "tiny FD", "tiny diversity", *names]
    for name in names:
        shares = metric(by_suite, name)
        assert shares.role == "share of correct images" and not shares.lower
        assert all(0 <= share <= 1 for share in (*shares.before, *shares.after))
    assert by_suite.prompts == [prompts[0] for prompts in suite().values()]


def test_the_suites_reference_is_its_drawings(by_suite):
    assert "tiny FD is the distance to drawings of the suite's prompts" in by_suite.notes
    assert all(value > 0 for value in metric(by_suite, "tiny FD").before)


def test_the_suite_without_a_reference_names_the_distances_that_are_missing():
    meter = Meter({}, Networks(dict.fromkeys(("tiny FD", "FID", "FD-DINOv2"), torch.nn.Identity())))
    note = set_reference(meter, small(suite="tinyeval"))
    assert note.endswith("of the suite's prompts; no --reference, so no FID or FD-DINOv2")
    assert set(meter.reference) == {"tiny FD"}


def test_the_suite_replaces_prompts_of_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox")
    config = build({"prompts": {"file": str(tmp_path / "prompts.txt"), "negative": "a pig"}}, "test")
    prompts = configured(config, small(suite="tinyeval")).prompts
    assert tuple(prompts.read()) == suite_prompts() and prompts.negative == "a pig"


def test_the_suite_is_refused_for_a_model_that_is_not_embedded():
    config = build({"model": {"name": "sd"}, "prompts": {"lines": PROMPTS}}, "test")
    with pytest.raises(ConfigError, match=r"--suite tinyeval judges images of the embedded models .* model is sd\."):
        configured(config, small(suite="tinyeval"))


@pytest.mark.parametrize("side", [128, 64])
def test_an_image_is_right_exactly_if_its_tinyeval_reward_is_1(side):
    prompts = ["a fox on a plain blue background", "two frogs on a dotted red background", "a pig above a star"]
    drawings = drawn([*prompts, *prompts], seed=0).permute(0, 3, 1, 2)
    images = torch.nn.functional.interpolate(drawings, (side, side), mode="area").permute(0, 2, 3, 1)
    asked = [*prompts, *reversed(prompts)]
    right = judged(load_image_encoder(), images, asked)
    assert right == (load_reward("tinyeval").score(images, asked) == 1).tolist()
    assert True in right and False in right


def test_the_demo_shows_one_image_of_a_prompt_and_first_what_was_wrong():
    right = [True] * 160
    right[6] = right[7] = right[43] = False  # the fourth prompt; only the second image of the 22nd
    rows = chosen(right, tasks=4)
    assert rows == [0, 6, 40, 42, 80, 82, 120, 122]
    right[80:100] = [False] * 20  # ten prompts of the third task
    rows = chosen(right, tasks=4)
    assert rows == [6, 80, 82, 84, 86, 88, 90, 92]
    assert len(rows) == PAIRS_SHOWN
