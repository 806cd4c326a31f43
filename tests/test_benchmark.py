"""The benchmark: each cell is an ordinary run that resumes, is done by one process and reported as it was measured."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from benchmark_grids import TASK, small, write

from benchmarks import guidance, reference_loop, tables
from benchmarks.collect import by_seed, collect, collect_common
from benchmarks.contenders import CONTENDERS, FORMS, PROMPTS, RECIPES, REWARDS, Form
from benchmarks.grid import (
    Cell,
    Task,
    cell_config,
    choose,
    common_settings,
    competing,
    fresh_cells,
    kept_gains,
    reported_cells,
    settings,
    tuning_cells,
)
from benchmarks.measure import EXAM, make_examiner, pictures
from benchmarks.report import LINE, report
from benchmarks.statistics import holm, t_test
from benchmarks.work import progress
from comfyui_pcpo.guidance import ImplicitReward
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.pipelines import MODELS
from tools.tiny.measure import drawn, shares, verdicts
from trainer.options import build
from trainer.plan import plan_steps
from trainer.sampling import Draw, Guide, sample, sampling_policy
from trainer.train import make_policy


@functools.cache
def policy_of(model: str):
    return make_policy(build({"model": {"name": model, "device": "cpu"}}, "test"))


def fill(form: Form, out, gain) -> None:
    """Write a grid's results by hand: gain(cell) is each cell's gain at the end, on a straight line."""
    for task in map(lambda t: Task(*t), form.tasks):
        for cell in [*tuning_cells(form, task), *reported_cells(form, task, choose(form, task, out) or {})]:
            write(cell, form, out, gain(cell))
        for cell in reported_cells(form, task, choose(form, task, out) or {}):
            write(cell, form, out, gain(cell))


@pytest.mark.parametrize("name", FORMS)
def test_every_cell_of_a_form_is_a_valid_run_whose_sampler_fits_its_model(name, tmp_path):
    form = FORMS[name]
    for recipe in {recipe for recipe, _ in form.tasks}:
        for contender in competing(form, Task(recipe, REWARDS[0])):
            config = cell_config(Cell(Task(recipe, REWARDS[0]), contender, 1e-3, 1e-3, 0), form, tmp_path)
            policy = policy_of(config.model.name)
            _, trained = plan_steps(policy, config, policy.grid(form.steps), 1)
            assert trained
            assert config.reward.weights == {REWARDS[0]: 1.0}


def test_contenders_differ_only_in_what_they_stand_for(tmp_path):
    form = small(contenders=tuple(CONTENDERS))
    base = cell_config(Cell(TASK, "ppo", 1e-3, 1e-3, 0), form, tmp_path)
    for name in competing(form, TASK):
        config = cell_config(Cell(TASK, name, 1e-3, 1e-3, 0), form, tmp_path)
        for section in ("model", "prompts", "reward", "advantage", "lora", "optimizer"):
            assert getattr(config, section) == getattr(base, section)
        changed = {k for k, v in config.rollout if v != getattr(base.rollout, k)}
        assert changed <= set(CONTENDERS[name].rollout)


def test_forward_contenders_never_start_a_group_from_one_noise_without_noise_later():
    """A shared first latent and the ODE would make all pictures of a group equal, and nothing could be learned."""
    for recipe in RECIPES.values():
        for contender in CONTENDERS.values():
            rollout = {**recipe.rollout, **contender.rollout}
            assert not (rollout["noise_level"] == 0 and rollout.get("shared_noise"))


@pytest.mark.parametrize("task", [Task("flow-grpo", "polish"), Task("ddpo", "colorfulness")])
def test_every_contender_chooses_from_the_same_settings(task):
    form = FORMS["medium"]
    sweep = form.sweep[RECIPES[task.recipe].kind]
    for name in competing(form, task):
        found = settings(form, task, name)
        if CONTENDERS[name].clips:
            assert found == list(sweep)
        else:
            assert [rate for rate, _ in found] == list(dict.fromkeys(rate for rate, _ in sweep))
            assert set(found) <= set(sweep)


@pytest.mark.parametrize("name", FORMS)
def test_settings_are_never_chosen_on_reported_seeds(name):
    assert not set(FORMS[name].tuning_seeds) & set(FORMS[name].seeds)


FOUR = {"flow": tuple(itertools.product((1e-3, 1e-2), (1e-4, 1e-3)))}


def test_the_setting_with_the_highest_mean_outcome_over_the_tuning_seeds_is_chosen(tmp_path):
    form = small(sweep=FOUR, tuning_seeds=(100, 101))
    assert choose(form, TASK, tmp_path) is None
    best = {"ppo": (1e-2, 1e-4), "pcpo": (1e-3, 1e-3)}
    for cell in tuning_cells(form, TASK):
        right = (cell.learning_rate, cell.clip_range) == best[cell.contender]
        # one lucky seed of another setting does not win
        lucky = cell.seed == 100 and cell.learning_rate == 1e-2 and cell.clip_range == 1e-3
        write(cell, form, tmp_path, 1.0 if right else 1.5 if lucky else 0.1)
    assert choose(form, TASK, tmp_path) == best


def test_gains_of_ruined_pictures_do_not_count(tmp_path):
    form = small(seeds=(0, 1))
    for cell in reported_cells(form, TASK, choose(form, TASK, tmp_path) or {}):
        write(cell, form, tmp_path, 2.0, kept=0.89 if cell.contender == "pcpo" else 0.91)
    runs = collect(form, tmp_path)[0].runs
    ruined, whole = runs["pcpo"][0], runs["ppo"][0]
    assert (whole.kept, ruined.kept) == ([0, 1, 2], [0, 1, 1])
    assert (whole.outcome, ruined.outcome) == pytest.approx((1.0, 0.75))
    assert (whole.reach(1.5), ruined.reach(1.5)) == (7.5, math.inf)
    assert (whole.gain_in("polish"), ruined.gain_in("polish")) == pytest.approx((0, 1))
    assert (whole.share, ruined.share) == pytest.approx((0.91, 0.89))


def test_pictures_that_come_back_count_again():
    result = {"gains": [0.0, 0.5, 1.0, 1.5], "rows": [{"object": share} for share in (0.8, 0.8, 0.7, 0.73)]}
    assert kept_gains(result) == [0.0, 0.5, 0.5, 1.5]


def test_a_setting_that_ruins_the_pictures_is_not_chosen_for_what_it_gains_by_that(tmp_path):
    form = small(sweep=FOUR, tuning_seeds=(100,))
    for cell in tuning_cells(form, TASK):
        fast = cell.learning_rate == 1e-2
        write(cell, form, tmp_path, (1.2 if fast else 1.0) + cell.clip_range, kept=0.5 if fast else 1.0)
    assert set(choose(form, TASK, tmp_path).values()) == {(1e-3, 1e-3)}
    assert "| PCPO | 0.50 | **0.50** | 0.45 (50 %) | 0.45 (50 %) |" in tables.tuning(form, TASK, tmp_path)


def test_contenders_are_compared_with_native_ppo_at_equal_settings(tmp_path):
    form = small(sweep=FOUR, tuning_seeds=(100,))
    for cell in tuning_cells(form, TASK):
        write(cell, form, tmp_path, {1e-4: 1.0, 1e-3: 0.2}[cell.clip_range] if cell.contender == "pcpo" else 0.4)
    # the mean height of a line is half its end: +0.3 twice, -0.1 twice
    assert "| PCPO | 2/4, +0.10 |" in tables.equal_settings(form, [TASK], tmp_path)


def test_each_task_has_its_own_settings_and_a_form_leaves_out_what_it_skips(tmp_path):
    first, second = Task("flow-grpo", "colorfulness"), Task("dance-sde", "polish")
    form = small(
        tasks=((first.recipe, first.reward), (second.recipe, second.reward)),
        contenders=("ppo", "pcpo", "awm"),
        skips=(("dance-sde", "awm"),),
        sweep={"flow": ((1e-3, 1e-3), (1e-2, 1e-3))},
        tuning_seeds=(100,),
    )
    for cell in tuning_cells(form, first):
        write(cell, form, tmp_path, cell.learning_rate)
    assert choose(form, first, tmp_path) == dict.fromkeys(("ppo", "pcpo", "awm"), (1e-2, 1e-3))
    assert choose(form, second, tmp_path) is None
    assert competing(form, second) == ["ppo", "pcpo"]
    assert progress(form, tmp_path) == (6, 6 + 3 + 4 + 2)
    form = dataclasses.replace(
        form, tasks=(form.tasks[0], ("dance-sde", "colorfulness")), tuned_as={"dance-sde": "flow-grpo"}
    )
    assert choose(form, Task("dance-sde", "colorfulness"), tmp_path) == dict.fromkeys(("ppo", "pcpo"), (1e-2, 1e-3))
    assert progress(form, tmp_path) == (6, 6 + 3 + 2)


def test_the_examination_reads_drawn_images_right():
    prompts = ["a fox on a plain blue background", "two frogs on a dotted red background"] * 4
    encoder = load_image_encoder(MODELS / "emoji-align")
    images = drawn(prompts, seed=0)
    assert shares(verdicts(encoder, images, prompts))["all"] == 1.0
    wrong = shares(verdicts(encoder, images, ["a pig", "two stars"] * 4))
    assert wrong["object"] == 0.0 and wrong["count"] == 0.0


def test_the_examination_finds_the_base_model_near_itself_and_far_from_noise(tmp_path):
    form = small(each=4, reference=64, steps=6)
    policy = make_policy(cell_config(Cell(TASK, "ppo", 1e-3, 1e-3, 0), form, tmp_path))
    examiner = make_examiner(policy, form, tmp_path)
    own = examiner.measure(policy)
    noise = examiner.judge(torch.rand(len(PROMPTS) * 4, 128, 128, 3, generator=torch.Generator().manual_seed(0)))
    assert own["fd_base"] < 0.2 * noise["fd_base"]
    assert own["object"] > 0.5 > noise["object"]
    assert own == make_examiner(policy, form, tmp_path).measure(policy)


def test_guidance_by_one_model_and_a_sum_of_one_lora_are_that_model(tmp_path):
    """The two ways of composing meet at the ends of the front, and differ between them."""
    config = cell_config(Cell(TASK, "pcpo", 1e-3, 1e-3, 0), small(), tmp_path)
    generator = torch.Generator().manual_seed(0)
    policy = sampling_policy(config, [])
    pairs = [
        {n: (torch.randn(2, *a.shape[1:], generator=generator), 0.3 * torch.randn(len(b), 2, generator=generator))
         for n, (a, b) in policy.lora().items()}
        for _ in range(2)
    ]  # fmt: skip

    def by(weights, way):
        guides = [Guide(p, ImplicitReward(w)) for p, w in zip(pairs, weights, strict=True)]
        guides = guides if way == "irg" else [Guide(guidance.summed(pairs, weights), ImplicitReward(1.0))]
        return sample(sampling_policy(config, [g.pairs for g in guides]), ("a fox",), guides, Draw(EXAM, 3, each=2))

    torch.testing.assert_close(by((1.0, 0.0), "irg"), by((1.0, 0.0), "sum"), atol=1e-3, rtol=0)
    assert (by((0.5, 0.5), "irg") - by((0.5, 0.5), "sum")).abs().max() > 0.01


def test_examination_and_sampling_draw_the_same_pictures(tmp_path):
    config = cell_config(Cell(TASK, "ppo", 1e-3, 1e-3, 0), small(), tmp_path)
    policy = make_policy(config)
    torch.testing.assert_close(
        sample(policy, PROMPTS, [], Draw(EXAM, 3, each=2)), pictures(policy, 2, EXAM, 3), atol=1e-4, rtol=0
    )


def test_the_reference_loop_makes_exactly_the_wanted_model_calls(tmp_path):
    policy = make_policy(cell_config(Cell(TASK, "ppo", 1e-3, 1e-3, 0), small(), tmp_path))
    calls = []
    policy.denoiser.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    condition, chunks = policy.encode(list(PROMPTS)), list(torch.arange(4).split(2))
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3)
    before = [p.detach().clone() for p in policy.trainable()]
    reference_loop.roll_out(policy, condition, [900.0, 500.0, 100.0], chunks)
    reference_loop.train(policy, optimizer, condition, [900.0, 500.0], chunks)
    assert calls == [False] * 6 + [True] * 4
    assert any(not torch.equal(p, b) for p, b in zip(policy.trainable(), before, strict=True))


def test_the_report_says_what_was_measured_and_keeps_what_was_written_by_hand(tmp_path):
    form = small(seeds=(0, 1, 2, 3, 4), contenders=("ppo", "pcpo", "nft"))
    slope = {"ppo": 0.4, "pcpo": 0.6, "nft": 0.9}
    fill(form, tmp_path, lambda cell: slope[cell.contender] + 0.01 * cell.seed)
    (tmp_path / "results.md").write_text("# Results\n\nPCPO wins.\n\n")
    for _ in range(2):
        report("quick", form, tmp_path, tmp_path, tmp_path / "images")
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Results\n\nPCPO wins.\n\n" + LINE)
    assert text.count(LINE) == 1
    assert "| PCPO | 0.006, 0.001 | 5 | 0.31 [0.30, 0.32] | 0.62 [" in text
    assert "| DiffusionNFT | 0.006, - | 5 | 0.46 [0.45, 0.47] | 0.92 [" in text
    beaten = "| native PPO | -0.10 [-0.10, -0.10] | < 0.001 | -0.10 [-0.10, -0.10] | < 0.001 | 0/5 |"
    assert beaten in text.split("against PCPO")[1]
    # +0.25 of 0.62 in the median seed, on a line that ends at update 10
    assert f"| PCPO | {10 * 0.25 / 0.62:.1f} [" in text
    assert {f.name for f in (tmp_path / "images").iterdir()} == {
        "effects.png",
        *(f"flow-grpo-colorfulness-{kind}.png" for kind in ("convergence", "health", "matched")),
    }


def test_fewer_updates_counts_the_seeds_in_which_either_contender_gets_to_the_goal(tmp_path):
    form = small(seeds=(0, 1, 2, 3, 4), contenders=("ppo", "pcpo", "nft"))
    ends = {"ppo": (0.5, 0.5, 0.5, 0.1, 0.1), "pcpo": (1.0, 1.0, 0.25, 0.5, 0.1), "nft": (0.1,) * 5}
    fill(form, tmp_path, lambda cell: ends[cell.contender][cell.seed])
    found = collect(form, tmp_path)
    # half the updates twice, twice the updates once, once alone (in half of what the other one ran), once neither
    assert tables.fewer(found, "pcpo", "ppo") == "50 % [-100 %, 50 %] of 4"
    assert tables.fewer(found, "nft", "ppo") == "never [never, never] of 3"
    assert tables.fewer(found, "ppo", "ppo") == "0 % [0 %, 0 %] of 3"
    assert tables.fewer(found, "nft", "nft") == "-"


def test_all_contenders_are_also_compared_at_one_setting(tmp_path):
    form = small(sweep=FOUR, tuning_seeds=(100,), contenders=("ppo", "pcpo", "nft"), common={"flow-grpo": (1e-2, 1e-3)})
    fill(form, tmp_path, lambda cell: 1.0 if cell.learning_rate == 1e-3 else 0.1)
    common = common_settings(form, TASK)
    assert common == {"ppo": (1e-2, 1e-3), "pcpo": (1e-2, 1e-3), "nft": (1e-2, 1e-4)}
    assert collect_common(form, tmp_path) == []
    for cell in reported_cells(form, TASK, common):
        write(cell, form, tmp_path, 0.4 if cell.contender == "pcpo" else 0.2)
    assert [len(runs) for runs in collect_common(form, tmp_path)[0].runs.values()] == [1, 1, 1]
    form = dataclasses.replace(form, fresh_seeds=(5, 6))
    for cell in fresh_cells(form, TASK):
        write(cell, form, tmp_path, (0.5 if cell.contender == "pcpo" else 0.1) + 0.1 * cell.seed)
    text = report("quick", form, tmp_path, tmp_path, tmp_path / "images").read_text()
    assert "| PCPO | 0.10 |" in text.split("## At one setting for all")[1]
    assert "on seeds 5, 6" in text and "PCPO against native PPO: 0.20 [0.20, 0.20] by seeds" in text
    assert common_settings(small(), TASK) == {}


def test_matched_reward_is_read_where_each_seed_reaches_it(tmp_path):
    form = small(seeds=(0, 1))
    fill(form, tmp_path, lambda cell: 0.5 if cell.contender == "pcpo" else 0.2)
    found = collect(form, tmp_path)[0]
    assert [run.matched("fd_base", 0.25) for run in found.runs["pcpo"]] == pytest.approx([105, 105])
    assert all(math.isnan(run.matched("fd_base", 0.25)) for run in found.runs["ppo"])
    assert found.runs["pcpo"][0].outcome == pytest.approx(0.25)
    assert found.runs["pcpo"][0].own == pytest.approx(0.95)


def test_the_report_says_where_a_choice_lies_at_an_end_of_the_sweep(tmp_path):
    form = small(sweep=FOUR, tuning_seeds=(100,))
    fill(form, tmp_path, lambda cell: cell.learning_rate * (1 if cell.contender == "pcpo" else -1) + cell.clip_range)
    text = report("quick", form, tmp_path, tmp_path, tmp_path / "images").read_text()
    assert "Chosen at the upper end of the learning rates: PCPO.\n" in text
    assert "Chosen at the lower end of the learning rates: native PPO.\n" in text
    assert "Chosen at the upper end of the clip ranges: native PPO, PCPO.\n" in text


def test_differences_are_averaged_over_tasks_before_seeds_are_compared(tmp_path):
    pairs = (("flow-grpo", "colorfulness"), ("dance-sde", "polish"))
    form = small(tasks=pairs, seeds=(0, 1, 2), contenders=("ppo", "pcpo", "nft"))
    slope = {"ppo": 0.0, "pcpo": 0.2, "nft": 0.6}
    fill(form, tmp_path, lambda c: slope[c.contender] * (1 + c.seed) * (2 if c.task.recipe == "dance-sde" else 1))
    found = collect(form, tmp_path)
    assert by_seed(found, "pcpo", "ppo") == pytest.approx([0.15, 0.3, 0.45])
    family = [t_test(by_seed(found, *pair)) for pair in (("pcpo", "ppo"), ("nft", "ppo"), ("nft", "pcpo"))]
    p = tables.chances(found)
    assert [p["pcpo", "ppo"], p["nft", "ppo"], p["nft", "pcpo"]] == pytest.approx(holm(family))
    assert p["ppo", "pcpo"] == p["pcpo", "ppo"]
    text, _ = tables.against(found, "ppo")
    assert f"| 0.30 [-0.07, 0.67] | {p['pcpo', 'ppo']:.3f} | 6/6 |" in text
