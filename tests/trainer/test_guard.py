"""The guard against reward hacking: it measures beside the run, keeps the best update within limits, and stops it."""

import itertools
import json
import math
import shutil
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
from running import kept as updates_of
from running import start_run
from safetensors.torch import load_file, save_file

from comfyui_pcpo.lora.formats import export_state
from comfyui_pcpo.method.adaptive_kl import RANGE, adapted_kl_weight
from comfyui_pcpo.plotting.run_curves import curve_panels
from trainer.cli.progress import update_line
from trainer.config.diagnostics import without_effect
from trainer.config.guard_section import GuardConfig
from trainer.config.loading import build, load, merge, with_options
from trainer.config.schema import ConfigError
from trainer.evaluation.demo import DEMO_RECIPES, demo_config
from trainer.guard.guard import read_measures
from trainer.guard.limits import GuardVerdict, guard_row, lost_deviations, next_verdict, replay, violation
from trainer.guard.probe import ImageMeasures, Probe
from trainer.loop.distributed import Processes
from trainer.policy.loading import make_policy
from trainer.policy.lora_pairs import read_lora
from trainer.runs.export import ExportOptions, export_lora
from trainer.runs.folder import RunFolder
from trainer.runs.launch import ResumeOptions, StoppedByGuard, resume_run
from trainer.runs.launch import start_run as launch_run

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WARN = {"guard": {"every": 1, "prompts": 2, "images": 2, "tolerance": 1e6, "action": "warn"}}
HELD_OUT = {"reward": {"held_out": ["alignment"]}}
HACKED = {
    "reward": {"weights": {"redness": 1.0}, "held_out": ["alignment"]},
    "rollout": {"group_size": 4},
    "optimizer": {"learning_rate": 0.005},
    "objective": {"clip_range": 0.1},
    "guard": {"every": 1, "prompts": 3, "images": 2, "tolerance": 0.05, "diversity_tolerance": 0.05, "patience": 2},
    "run": {"updates": 12, "save_every": 100},
}


def train(config, tick=lambda: None) -> RunFolder:
    folder, updates = start_run(config, tick)
    list(updates)
    return folder


def resumed(folder: RunFolder, **how) -> RunFolder:
    list(updates_of(resume_run(folder.path, ResumeOptions(**how))))
    return folder


def rows(folder: RunFolder, *without: str):
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds_") and k not in without} for row in folder.records()
    ]


def same_tensors(left, right):
    a, b = load_file(left), load_file(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def lost(alignment: float, diversity: float = 0.0, reward: float | None = 1.0):
    return {"reward": reward, "lost": {"alignment": alignment, "diversity": diversity}}


@pytest.fixture(scope="module")
def hacked(tmp_path_factory):
    """A run whose guard stops it, and the lines that it printed."""
    base = {
        "model": {"name": "emoji-flow", "device": "cpu"},
        "prompts": {"lines": ["a fox", "a red star", "two frogs"]},
        "rollout": {"prompts_per_update": 1, "steps": 3},
        "objective": {"last_step": True},
        "lora": {"rank": 2},
        "optimizer": {"minibatches": 1},
        "run": {"name": "hacked", "folder": str(tmp_path_factory.mktemp("runs")), "preview_every": 0},
    }
    run = launch_run(build(merge(base, HACKED), "test"))
    lines = [update_line(update) for update in updates_of(run)]
    return run.folder, lines


def test_a_run_without_a_guard_records_nothing_of_it(make_config):
    folder = train(make_config(**HELD_OUT))
    assert not any(key.startswith("guard") or key == "kl_weight" for row in rows(folder) for key in row)
    assert not folder.guard_file.exists()
    assert "kl_weight" not in json.loads((folder.checkpoint() / "state.json").read_text())


def test_measuring_does_not_change_the_run(make_config, model):
    """Metrics, LoRA and optimizer of a run whose guard only warns, bit for bit."""
    common = merge(HELD_OUT, {"optimizer": {"ema_decay": 0.5, "ema_every": 1}})
    plain = train(make_config(model, **merge(common, {"run": {"name": "plain"}})))
    watched = train(make_config(model, **merge(merge(common, WARN), {"run": {"name": "watched"}})))
    assert rows(plain) == rows(watched, "guard")
    assert all("guard" in row for row in watched.records())
    for name in ("lora.safetensors", "average.safetensors"):
        same_tensors(plain.checkpoint() / name, watched.checkpoint() / name)


def test_an_untrained_lora_is_the_base_model(make_config):
    """With a learning rate that moves nothing, all losses and the distance are 0."""
    config = make_config(**merge(merge(HELD_OUT, WARN), {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}}))
    for row in train(config).records():
        assert row["guard"]["lost"] == {"alignment": 0.0, "diversity": 0.0}
        assert row["guard"]["distance"] == pytest.approx(0, abs=1e-9)
        assert row["guard"]["kept"] == 1  # ties go to the earliest


def test_the_guard_measures_every_few_updates_and_the_last_one(make_config):
    folder = train(make_config(**merge(WARN, {"guard": {"every": 2}, "run": {"updates": 3}})))
    assert [row["update"] for row in folder.records() if "guard" in row] == [2, 3]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_the_guard_is_on_with_loose_limits_in_every_ready_configuration(file):
    config = load(file)
    assert 0 < config.guard.every <= 10 <= config.run.updates
    assert config.guard.tolerance == GuardConfig().tolerance >= 0.8
    assert config.guard.diversity_tolerance == GuardConfig().diversity_tolerance >= 0.3


@pytest.mark.parametrize("reward", ["tinyeval", "colorfulness"])
def test_the_guard_is_on_in_the_demo_and_off_by_default(tmp_path, reward):
    demo = demo_config(reward, "demo", tmp_path, updates=30, seed=0)
    assert 0 < demo.guard.every <= 10 and reward not in demo.reward.held_out
    recipe = DEMO_RECIPES[reward]
    assert demo_config(reward, "demo", tmp_path, updates=None, seed=0).run.updates == recipe.updates
    assert recipe.method == {"nft": "DiffusionNFT", "log_hinge": "PCPO"}[demo.objective.name]
    assert GuardConfig().every == 0


def test_an_update_without_a_checkpoint_is_not_kept_and_its_violation_counts():
    guard = GuardConfig(every=5, tolerance=0.5)
    measured = {5: lost(0.1, reward=3.0), 10: lost(0.1, reward=1.0), 15: lost(0.9, reward=9.0)}
    records = [{"update": number, "guard": row} for number, row in measured.items()]
    verdict = replay(records, guard, [10, 15])
    assert (verdict.kept, verdict.reward, verdict.violations) == (10, 1.0, 1)
    assert replay(records, guard, []) == GuardVerdict(violations=1, reason=violation({"alignment": 0.9}, guard))


def test_a_run_whose_best_update_was_not_saved_keeps_another(make_config):
    """As after larger tolerances, which allow an update that the guard did not save, or an earlier --checkpoint."""
    still = {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}}  # all rewards are equal: the first is kept
    folder = train(make_config(**merge(WARN, still)))
    assert folder.kept_number() == 1
    shutil.rmtree(folder.checkpoints.path / "000001")
    resumed(folder, updates=3)
    assert len(folder.records()) == 3
    assert folder.kept_number() == int(folder.checkpoint("final").name) == 2
    assert read_lora(folder.lora_file)[1]["pcpo.updates"] == "2"


@pytest.mark.parametrize("half_saved", [True, False])
def test_a_run_goes_on_with_its_settings_whatever_an_editor_does_to_its_configuration(make_config, half_saved):
    still = {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}, "run": {"updates": 3, "keep": 1}}
    folder, updates = start_run(make_config(**merge(WARN, still)))  # all rewards are equal: the first is kept
    next(updates)
    first = folder.lora_file.read_bytes()
    text = folder.config_file.read_text()
    edited = text.replace("rank = 2\n", "rank = 2\nalpha = 64.0\n")
    assert edited != text
    folder.config_file.write_text(text[: text.index("rank = 2") + len("rank = ")] if half_saved else edited)
    list(updates)
    assert folder.lora_file.read_bytes() == first


def test_the_lora_is_the_kept_one_even_if_the_run_is_killed(make_config):
    still = {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}}
    folder, updates = start_run(make_config(**merge(WARN, still)))
    for _ in updates:
        assert folder.kept_number() == int(read_lora(folder.lora_file)[1]["pcpo.updates"]) == 1


def test_a_damaged_kept_checkpoint_is_named_when_a_run_is_resumed(make_config):
    still = {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}}
    folder = train(make_config(**merge(WARN, still)))
    (folder.checkpoint("kept") / "lora.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"000001 is damaged: .* Remove it, and the guard keeps another update"):
        resumed(folder, updates=3)
    shutil.rmtree(folder.checkpoint("kept"))
    resumed(folder, updates=3)
    assert folder.kept_number() == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes")
def test_a_full_disk_is_named_where_the_update_to_keep_could_not_be_saved(make_config):
    import resource

    hacked = {"guard": {"diversity_tolerance": 1.0}, "optimizer": {"learning_rate": 5e-3}}
    config = make_config(**merge(merge(WARN, HELD_OUT), hacked))
    folder, updates = start_run(config)
    next(updates)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(ConfigError, match=r"checkpoint 000002 could not be written .* raise the limit on file"):
            next(updates)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert folder.records()[-1]["guard"]["kept"] == 2
    assert folder.checkpoints.numbers() == [1]
    assert folder.kept_number() == int(folder.checkpoint("final").name) == 1
    assert folder.kept_number() == int(read_lora(folder.lora_file)[1]["pcpo.updates"])
    resumed(folder)
    assert folder.kept_number() == 2


def test_the_lora_of_a_run_whose_guard_was_turned_off_is_the_latest(make_config):
    still = {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}}
    folder = train(make_config(**merge(WARN, still)))
    assert folder.checkpoint("final").name == "000001"
    folder.rewrite_config(with_options(folder.config(), {"guard": {"every": 0}}))
    resumed(folder, updates=3)
    assert folder.checkpoint("final").name == "000003"
    assert read_lora(folder.lora_file)[1]["pcpo.updates"] == "3"


def test_a_guard_that_is_off_calls_neither_the_model_nor_a_reward(make_config, monkeypatch):
    """As many model calls as an update needs, and one scoring of each reward."""
    scored = []
    monkeypatch.setattr("trainer.guard.probe.score", lambda *_, **__: scored.append(1))
    calls = []
    config = make_config(**merge(HELD_OUT, {"objective": {"kl_images": 0}}))
    run = launch_run(config, lambda: calls.append(1))
    list(updates_of(run))
    assert run.guard is None and not scored
    assert len(calls) == config.run.updates * (config.rollout.steps + config.rollout.steps)


def test_adaptive_kl_weight_by_hand():
    assert adapted_kl_weight(1.0, 3.1, budget=2.0, start=1.0) == 1.5
    assert adapted_kl_weight(1.5, 1.3, budget=2.0, start=1.0) == 1.0
    for kl in (2.9, 2.0, 1.4, math.nan):
        assert adapted_kl_weight(1.0, kl, budget=2.0, start=1.0) == 1.0
    assert adapted_kl_weight(1.0 / RANGE, 0.0, budget=2.0, start=1.0) == 1.0 / RANGE
    assert adapted_kl_weight(RANGE, 9.0, budget=2.0, start=1.0) == RANGE


def test_the_adaptive_kl_weight_follows_the_kl_of_each_update(make_config):
    config = make_config(guard={"kl_budget": 1e-4, "kl_start": 0.5}, run={"updates": 4})
    recorded = train(config).records()
    assert recorded[0]["kl_weight"] == 0.5
    for before, after in itertools.pairwise(recorded):
        expected = adapted_kl_weight(before["kl_weight"], before["kl"], 1e-4, 0.5)
        assert after["kl_weight"] == expected
    assert len({row["kl_weight"] for row in recorded}) > 1


def test_a_kl_budget_reduces_the_kl(make_config):
    common = {"optimizer": {"learning_rate": 5e-3}, "run": {"updates": 5}, "objective": {"clip_range": 0.1}}
    free = train(make_config(**merge(common, {"objective": {"kl_images": 2, "kl_every": 5}, "run": {"name": "free"}})))
    held = train(make_config(**merge(common, {"guard": {"kl_budget": 1e-6, "kl_start": 1e3}, "run": {"name": "held"}})))
    assert held.records()[-1]["kl"] < 0.5 * free.records()[-1]["kl"]


def test_a_fixed_kl_weight_and_a_budget_are_refused(make_config):
    with pytest.raises(ConfigError, match=r"guard.kl_budget 0.1 adapts the KL weight, but objective.kl_weight 0.2"):
        make_config(guard={"kl_budget": 0.1}, objective={"kl_weight": 0.2})


def test_idle_options_of_the_guard_are_named(make_config):
    assert without_effect(make_config(guard={"images": 3, "diversity_tolerance": 0.2, "kl_start": 0.1})) == [
        "guard.images has no effect, because guard.every is 0.",
        "guard.diversity_tolerance has no effect, because guard.every is 0.",
        "guard.kl_start has no effect, because guard.kl_budget is 0.",
    ]


def test_losses_are_in_standard_deviations_of_the_base_scores():
    base = torch.tensor([0.0, 2.0, 0.0, 2.0])  # mean 1, std 1
    assert lost_deviations(base - 0.25, base) == pytest.approx(0.25)
    assert lost_deviations(base + 0.5, base) == pytest.approx(-0.5)
    assert lost_deviations(torch.tensor([math.nan, 0.5]), base) == pytest.approx(0.5)  # a failed score is left out


def test_one_wrong_image_is_no_infinite_loss_where_all_of_the_base_models_were_right():
    right, one_wrong = torch.ones(16), torch.ones(16)
    one_wrong[0] = 0.0
    assert lost_deviations(one_wrong, right) == pytest.approx(1 / 15**0.5)  # 1/16 of deviation sqrt(15) / 16
    assert lost_deviations(right, right) == 0.0
    assert lost_deviations(torch.zeros(16), right) == pytest.approx(2.0)  # 1 of deviation 1/2, that of both together
    assert violation({"tinyeval": lost_deviations(torch.zeros(16), right)}, GuardConfig())  # none right any more


def test_what_was_lost_by_hand(make_config):
    """Features in two groups: the base model's differ at right angles (diversity 1), the present ones by 60 degrees."""
    base = torch.eye(2).repeat(2, 1)
    now = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]]).repeat(2, 1)
    measures = ImageMeasures({"alignment": torch.tensor([0.0, 2.0, 0.0, 2.0]), "colorfulness": torch.zeros(4)}, base)
    later = ImageMeasures({"alignment": torch.full((4,), 0.5), "colorfulness": torch.ones(4)}, now)
    config = make_config(**merge(WARN, HELD_OUT))
    row = guard_row(later, measures, config)
    assert row["lost"] == pytest.approx({"alignment": 0.5, "diversity": 0.5})
    assert (row["reward"], row["held_out"], row["diversity"]) == (1.0, {"alignment": 0.5}, pytest.approx(0.5))
    assert row["distance"] == pytest.approx((1 - 0.75**0.5) / 2)
    assert guard_row(measures, later, config)["lost"]["diversity"] == pytest.approx(-1.0)  # gained


def test_the_guards_prompts_are_evenly_spaced_over_the_runs(make_config):
    config = make_config(guard={"every": 1, "prompts": 4, "images": 2})
    lines = [f"a fox {n}" for n in range(8)]
    probe = Probe(make_policy(config), config, lines, {}, Processes(), lambda: None)
    assert probe.texts[::2] == probe.texts[1::2] == [lines[k] for k in (0, 2, 4, 6)]


def test_the_guards_noise_is_that_of_the_seed(make_config):
    images = []
    for seed in (0, 1):
        config = make_config(guard={"every": 1, "prompts": 1, "images": 2}, run={"seed": seed})
        images.append(Probe(make_policy(config), config, ["a fox"], {}, Processes(), lambda: None).images())
    assert not torch.equal(*images)


def test_the_guard_measures_the_average_of_a_run_that_keeps_one(make_config):
    fast = {"optimizer": {"learning_rate": 0.05}, "run": {"updates": 3}}
    still = {"optimizer": {"ema_decay": 0.5, "ema_every": 1000}, "run": {"name": "still"}}  # not updated in this run

    def distance(*sections):
        return train(make_config(**reduce(merge, sections, WARN))).records()[-1]["guard"]["distance"]

    assert distance(fast, still) < 0.01 * distance(fast)


def test_a_violation_names_all_that_is_beyond_its_tolerance():
    guard = GuardConfig(tolerance=0.8, diversity_tolerance=0.2)
    assert violation({"alignment": 0.8, "diversity": 0.2}, guard) is None
    diversity = "diversity lost 81 % against the base model, more than the 20 % that guard.diversity_tolerance allows"
    assert violation({"alignment": 0.3, "diversity": 0.81}, guard) == diversity
    alignment = (
        "alignment lost 1.25 standard deviations against the base model, more than the 0.8 that guard.tolerance allows"
    )
    assert violation({"alignment": 1.25, "diversity": 0.81}, guard) == f"{alignment}; {diversity}"
    assert "alignment could not be measured" in violation({"alignment": None, "diversity": 0.0}, guard)


def test_the_highest_reward_within_the_limits_is_kept():
    guard = GuardConfig(every=1, tolerance=0.5)
    measured = [lost(0.1, reward=1.0), lost(0.2, reward=3.0), lost(0.3, reward=2.0), lost(0.9, reward=9.0)]
    verdict = replay([{"update": n, "guard": row} for n, row in enumerate(measured, 1)], guard, range(1, 5))
    assert (verdict.kept, verdict.reward, verdict.violations) == (2, 3.0, 1)


def test_rewards_and_violations_of_other_measurements_do_not_count():
    """The kept update stays until a measurement of the new kind is within the limits."""
    guard = GuardConfig(every=1, tolerance=0.5)

    def verdict(*measured, now="b"):
        rows = [{"update": n, "guard": {**row, **probe}} for n, (row, probe) in enumerate(measured, 1)]
        return replay(rows, guard, range(9), now)

    old, easy, hard = {}, {"probe": "a"}, {"probe": "b"}
    best, beyond = (lost(0.1, reward=0.9), easy), (lost(0.9), easy)
    worse = (lost(0.1, reward=0.3), hard), (lost(0.1, reward=0.4), hard)
    assert verdict(best, *worse) == GuardVerdict(3, 0.4)
    assert verdict(best, beyond) == GuardVerdict(1)
    assert verdict(best, beyond, (lost(0.9), hard)).violations == 1
    assert verdict(best, beyond, (lost(0.9), hard)).kept == 1
    assert verdict(best, beyond, now="a").violations == 1
    assert verdict((lost(0.1, reward=0.9), old), *worse) == GuardVerdict(1, 0.9)


@pytest.mark.parametrize("before", [1, 3])
def test_a_guard_of_other_prompts_compares_only_its_own_measurements(make_config, before):
    still = {"optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}}
    folder = train(make_config(**merge(merge(WARN, still), {"guard": {"prompts": before}})))
    folder.rewrite_config(with_options(folder.config(), {"guard": {"prompts": 4 - before}}))
    resumed(folder, updates=3)
    assert folder.kept_number() == int(read_lora(folder.lora_file)[1]["pcpo.updates"]) == 3


def test_a_measurement_within_the_limits_resets_patience():
    guard = GuardConfig(every=1, tolerance=0.5)
    verdict = GuardVerdict()
    counts = []
    for number, amount in enumerate((0.9, 0.9, 0.1, 0.9), 1):
        verdict = next_verdict(verdict, lost(amount), number, guard)
        counts.append(verdict.violations)
    assert counts == [1, 2, 0, 1]


def test_a_reward_that_failed_everywhere_is_never_kept():
    assert next_verdict(GuardVerdict(), lost(0.0, reward=None), 1, GuardConfig(every=1)).kept is None
    assert next_verdict(GuardVerdict(), lost(0.0, reward=math.nan), 1, GuardConfig(every=1)).kept is None


def test_a_hacked_reward_stops_the_run_and_an_earlier_checkpoint_is_kept(hacked):
    folder, lines = hacked
    last = folder.records()[-1]
    assert last["update"] < 12
    assert last["guard"]["violations"] == 2
    assert last["guard"]["message"].startswith("the guard stops the run: ")
    assert last["guard"]["message"] in lines[-1]
    kept = last["guard"]["kept"]
    assert kept is not None and kept < last["update"]
    assert last["guard"]["reward"] > folder.records()[kept - 1]["guard"]["reward"]
    assert folder.checkpoint("kept") == folder.checkpoint(str(kept)) != folder.checkpoint()


def test_the_lora_of_a_guarded_run_is_the_kept_one(hacked, tmp_path):
    folder, _ = hacked
    config, number = folder.config(), folder.kept_number()
    family = read_lora(folder.lora_file)[1]["pcpo.family"]
    exported = export_state(folder.lora(str(number)), config.lora.rank, config.lora.rank, "comfyui", family)
    save_file({key: value.contiguous() for key, value in exported.items()}, tmp_path / "kept.safetensors")
    same_tensors(tmp_path / "kept.safetensors", folder.lora_file)
    assert read_lora(folder.lora_file)[1]["pcpo.updates"] == str(number)
    latest = folder.lora()
    assert any(not torch.equal(latest[name][1], pair[1]) for name, pair in folder.lora("kept").items())
    assert folder.checkpoint("final") == folder.checkpoint("kept")
    same_tensors(export_lora(folder.path, ExportOptions(out=tmp_path / "exported.safetensors")), folder.lora_file)


def test_a_stopped_run_comes_to_the_same_end_unless_its_settings_change(hacked, tmp_path):
    source, _ = hacked
    folder = RunFolder(shutil.copytree(source.path, tmp_path / "copy"))
    with pytest.raises(ConfigError, match=r"was stopped by its guard: .* --checkpoint kept --accept-changes`"):
        resumed(folder)
    kept = folder.kept_number()
    resumed(folder, checkpoint=str(kept))
    assert rows(folder) == rows(source)  # it comes to the same end
    folder.rewrite_config(with_options(folder.config(), {"optimizer": {"learning_rate": 1e-4}}))
    resumed(folder, checkpoint="kept", accept_changes=True)
    assert folder.records()[-1]["update"] > source.records()[-1]["update"]


def test_a_stopped_run_goes_on_if_its_guard_only_warns(hacked, tmp_path):
    source, _ = hacked
    folder = RunFolder(shutil.copytree(source.path, tmp_path / "copy"))
    changes = {"guard": {"action": "warn"}, "run": {"updates": source.records()[-1]["update"] + 1}}
    folder.rewrite_config(with_options(folder.config(), changes))
    resumed(folder)
    assert rows(folder)[:-1] == rows(source)


def test_a_stopped_run_without_a_kept_update_is_not_told_to_resume_from_it(tmp_path):
    message = str(StoppedByGuard(RunFolder(tmp_path), GuardVerdict(reason="diversity lost 81 %")))
    assert "--checkpoint kept" not in message
    assert message.endswith("start a new run with a lower optimizer.learning_rate or a higher objective.kl_weight.")


def test_warn_goes_on_after_the_patience(make_config):
    folder = train(make_config(**merge(HACKED, {"guard": {"action": "warn"}, "run": {"updates": 6}})))
    assert len(folder.records()) == 6


def test_a_run_without_a_guard_has_no_kept_checkpoint(make_config):
    folder = train(make_config(run={"updates": 1}))
    with pytest.raises(ConfigError, match=r"no kept checkpoint: the guard was off"):
        folder.checkpoint("kept")


def test_a_resumed_guarded_run_equals_an_uninterrupted_one(make_config):
    """Interrupted while the guard measures update 3: that update is undone, and everything comes out the same."""
    guard = {"guard": {"every": 1, "prompts": 2, "images": 2, "tolerance": 100.0, "kl_budget": 1e-4}}
    common = merge(HELD_OUT, guard)
    whole = train(make_config(**merge(common, {"run": {"name": "whole", "updates": 4}})))

    def stop():
        if run.state.done == 3:  # the update's own model calls come before its number
            raise KeyboardInterrupt

    run = launch_run(make_config(**merge(common, {"run": {"name": "parts", "updates": 4, "save_every": 100}})), stop)
    with pytest.raises(KeyboardInterrupt):
        list(updates_of(run))
    assert run.state.done == run.folder.checkpoints.numbers()[-1] == len(run.folder.records()) == 2
    resumed(run.folder)
    assert rows(run.folder) == rows(whole)
    one, other = whole.checkpoint(), run.folder.checkpoint()
    same_tensors(one / "lora.safetensors", other / "lora.safetensors")
    assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())
    same_tensors(whole.lora_file, run.folder.lora_file)
    same_tensors(whole.guard_file, run.folder.guard_file)


def test_base_values_of_other_images_are_not_read(make_config):
    config = make_config(**merge(WARN, {"run": {"updates": 1}}))
    run = launch_run(config)
    list(updates_of(run))
    probe = run.guard.probe
    assert read_measures(run.folder.guard_file, probe.identity) is not None
    assert read_measures(run.folder.guard_file, probe.identity + "x") is None
    run.folder.guard_file.write_bytes(b"damaged")
    assert read_measures(run.folder.guard_file, probe.identity) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"quantize": "int8"}},
        {"reward": {"precision": "float16"}},
        {"reward": {"weights": {"colorfulness": 2.0}}},
        {"guard": {"images": 3}},
    ],
)
def test_measurements_are_compared_only_if_model_rewards_and_images_are_the_same(make_config, changed):
    def identity(config, content=None):
        return Probe(policy, config, ["a fox"], {}, Processes(), lambda: None, content).identity

    policy, config = make_policy(make_config()), make_config()
    assert identity(make_config(**changed)) != identity(config) != identity(config, "content of a host's model")
    assert identity(make_config(run={"updates": 9}, guard={"tolerance": 0.1})) == identity(config)


def test_models_without_an_encoder_are_compared_by_pixels(make_config):
    run = launch_run(make_config(**merge(WARN, {"run": {"updates": 1}})))
    with run:
        own = run.guard.probe
        own.__dict__["encoder"] = None
        images = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(0))
        features = own.features(images)
    assert features.shape == (2, 3 * 16 * 16)
    blocks = images.view(2, 16, 2, 16, 3, 3).mean((2, 4))
    torch.testing.assert_close(features.view(2, 3, 16, 16), blocks.permute(0, 3, 1, 2))


def test_the_curves_have_a_guard_panel_only_where_it_measured(hacked):
    records = hacked[0].records()
    (panel,) = curve_panels(records, 0.6, ["guard"])
    assert [line.label for line in panel.lines] == ["alignment (std)", "diversity (share)"]
    assert list(panel.lines[0].y) == [-row["guard"]["lost"]["alignment"] for row in records]
    without = [{k: v for k, v in row.items() if k != "guard"} for row in records]
    assert "Guard" not in {panel.title for panel in curve_panels(without, 0.6, ["reward", "guard"])}


def test_the_demo_trains_no_combination_that_it_is_measured_on():
    from comfyui_pcpo.tiny.captions import is_held_out
    from comfyui_pcpo.tiny.tinyeval import HARD, known_scene, suite_prompts, task_of
    from trainer.evaluation.demo import DEMO_PROMPTS

    scenes = [known_scene(prompt) for prompt in DEMO_PROMPTS]
    assert not any(is_held_out(scene) for scene in scenes)
    assert {task_of(scene) for scene in scenes} == set(HARD)
    assert set(DEMO_PROMPTS).isdisjoint(suite_prompts())
