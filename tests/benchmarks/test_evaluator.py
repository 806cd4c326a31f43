"""The evaluation of a model, two LoRAs composed, and the reference loop of the speed measurements."""

import numpy as np
import pytest
import torch
from benchmark_grids import SETTING, TASK, small

from benchmarks.speed.reference_loop import bare_rollout, bare_update
from benchmarks.study import two_rewards
from benchmarks.study.cell_config import cell_config
from benchmarks.study.evaluator import EVALUATION_SEED, Evaluation, make_evaluator, ode_images, tinyeval_prompts
from benchmarks.study.grid import Cell
from benchmarks.study.recipes import STUDY_PROMPTS
from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.metrics.features import extract, load_tiny_features
from comfyui_pcpo.reward import load_reward
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.tinyeval import HARD, suite, suite_prompts
from tools.tiny.measure import attribute_shares, drawn, verdicts
from trainer.evaluation.metrics import judged
from trainer.evaluation.sampling import Draw, Guide, sample, sampling_policy
from trainer.loop.finite import Diverged
from trainer.policy.loading import make_policy

pytestmark = pytest.mark.slow


def test_the_evaluation_recognises_drawings():
    prompts = ["a fox on a plain blue background", "two frogs on a dotted red background"] * 4
    encoder = load_image_encoder()
    images = drawn(prompts, seed=0)
    assert attribute_shares(verdicts(encoder, images, prompts))["all"] == 1
    others = attribute_shares(verdicts(encoder, images, ["a pig", "a star"] * 4))
    assert others["object"] == others["count"] == 0


def test_the_evaluation_finds_the_base_model_near_itself_and_far_from_noise(tmp_path):
    evaluation = Evaluation(images=32, reference_images=64, steps=6, prompts=STUDY_PROMPTS)
    policy = make_policy(cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path))
    evaluator = make_evaluator(policy, evaluation, tmp_path)
    own = evaluator.evaluate_policy(policy)
    generator = torch.Generator().manual_seed(0)
    noise = evaluator.evaluate_images(torch.rand(len(evaluation.texts), 128, 128, 3, generator=generator))
    assert own["fd_base"] < 0.2 * noise["fd_base"]
    assert own["right"] > 0.5 > noise["right"]
    assert own == make_evaluator(policy, evaluation, tmp_path).evaluate_policy(policy)


def test_an_evaluation_by_hand(tmp_path):
    """The Frechet distance by numpy, from unbiased covariances; a reward's deviation is that of the images."""
    evaluation = Evaluation(images=32, reference_images=64, steps=3, prompts=STUDY_PROMPTS)
    policy = make_policy(cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path))
    evaluator = make_evaluator(policy, evaluation, tmp_path)
    images = ode_images(policy, 4, EVALUATION_SEED, 3, STUDY_PROMPTS)
    row = evaluator.evaluate_images(images)
    own, base = extract(load_tiny_features(), images)[0].double().numpy(), evaluator.base.double().numpy()
    s_own, s_base = np.cov(own.T), np.cov(base.T)
    roots = np.sqrt(np.linalg.eigvals(s_own @ s_base).real.clip(0)).sum()
    distance = ((own.mean(0) - base.mean(0)) ** 2).sum() + np.trace(s_own) + np.trace(s_base) - 2 * roots
    assert row["fd_base"] == pytest.approx(distance, rel=1e-3)
    scores = load_reward("colorfulness").score(images, evaluation.texts).double().numpy()
    assert (row["colorfulness"], row["colorfulness_std"]) == pytest.approx((scores.mean(), scores.std()), rel=1e-5)


def test_the_reference_is_of_other_noise_and_of_all_its_images(tmp_path):
    evaluation = Evaluation(images=32, reference_images=64, steps=3, prompts=STUDY_PROMPTS)
    policy = make_policy(cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path))
    base = make_evaluator(policy, evaluation, tmp_path).base
    assert len(base) == evaluation.reference_images
    (evaluated,) = extract(load_tiny_features(), ode_images(policy, 8, EVALUATION_SEED, 3, STUDY_PROMPTS))
    assert (base - evaluated).norm(dim=1).min() > 0.01 * base.norm(dim=1).mean()


def test_images_that_are_not_finite_are_a_diverged_run(tmp_path):
    policy = make_policy(cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path))
    evaluator = make_evaluator(policy, Evaluation(16, 16, 2, STUDY_PROMPTS, tinyeval_prompts=1), tmp_path)
    images = torch.full((16, 128, 128, 3), 0.5)
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="the pixels of 1 of 16 evaluated images are NaN or infinite"):
        evaluator.evaluate_images(images)
    policy.load_lora({name: (down, up + float("inf")) for name, (down, up) in policy.lora().items()})
    for evaluate in (evaluator.evaluate_policy, evaluator.tinyeval_shares):
        with pytest.raises(Diverged, match=r"the latents of .* are NaN or infinite"):
            evaluate(policy)
    assert evaluator.evaluate_base(policy)["fd_base"] > 0


def test_tinyeval_prompts_are_evenly_spaced_over_each_hard_task():
    assert tinyeval_prompts(20) == suite_prompts(HARD)
    assert tinyeval_prompts(2) == suite_prompts(HARD)[::10]
    assert tinyeval_prompts(12)[:12] == tuple(suite()[HARD[0]][k] for k in (0, 1, 3, 5, 6, 8, 10, 11, 13, 15, 16, 18))
    assert [len(tinyeval_prompts(count)) for count in (1, 12, 15, 40)] == [4, 48, 60, 160]


def test_tinyeval_reads_one_image_of_each_hard_prompt(tmp_path):
    """Drawings of the prompts are all right, and all wrong for the other prompts."""
    policy = make_policy(cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path))
    evaluator = make_evaluator(policy, Evaluation(16, 16, 2, STUDY_PROMPTS, tinyeval_prompts=2), tmp_path)
    found = evaluator.tinyeval_shares(policy)
    assert set(found) == {*HARD, "hard tasks"}
    assert found["hard tasks"] == pytest.approx(sum(found[task] for task in HARD) / len(HARD))
    prompts = suite_prompts(HARD)[::10]
    assert all(judged(evaluator.network.encoder, drawn(prompts, seed=0), prompts))
    assert not any(judged(evaluator.network.encoder, drawn(prompts, seed=0), (*prompts[1:], prompts[0])))


def test_many_prompts_get_two_images_each_so_that_their_diversity_is_defined():
    evaluation = Evaluation(images=16, reference_images=64, steps=2, prompts=tuple("abcdefghij"))
    assert evaluation.texts == [prompt for prompt in "abcdefghij" for _ in range(2)]


def test_guidance_by_one_lora_and_a_sum_of_one_lora_agree(tmp_path):
    """The two ways of composing meet at the ends of the front, and differ between them."""
    config = cell_config(Cell(TASK, "pcpo", SETTING, 0), small(), tmp_path)
    generator = torch.Generator().manual_seed(0)
    policy = sampling_policy(config, [])
    pairs = [
        {n: (torch.randn(2, *a.shape[1:], generator=generator), 0.3 * torch.randn(len(b), 2, generator=generator))
         for n, (a, b) in policy.lora().items()}
        for _ in range(2)
    ]  # fmt: skip

    def by(weights, way):
        guides = [Guide(p, ImplicitReward(w)) for p, w in zip(pairs, weights, strict=True)]
        guides = guides if way == "irg" else [Guide(two_rewards.summed(pairs, weights), ImplicitReward(1.0))]
        composed = sampling_policy(config, [g.pairs for g in guides])
        return sample(composed, ("a fox",), guides, Draw(EVALUATION_SEED, 3, each=2))

    torch.testing.assert_close(by((1.0, 0.0), "irg"), by((1.0, 0.0), "sum"), atol=1e-3, rtol=0)
    assert (by((0.5, 0.5), "irg") - by((0.5, 0.5), "sum")).abs().max() > 0.01


def test_evaluation_and_sampling_generate_the_same_images(tmp_path):
    config = cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path)
    policy = make_policy(config)
    sampled = sample(policy, STUDY_PROMPTS, [], Draw(EVALUATION_SEED, 3, each=2))
    torch.testing.assert_close(sampled, ode_images(policy, 2, EVALUATION_SEED, 3, STUDY_PROMPTS), atol=1e-4, rtol=0)


def test_the_reference_loop_makes_exactly_the_requested_model_calls(tmp_path):
    policy = make_policy(cell_config(Cell(TASK, "ppo", SETTING, 0), small(), tmp_path))
    calls = []
    policy.denoiser.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    condition, chunks = policy.encode(list(STUDY_PROMPTS)), list(torch.arange(4).split(2))
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3)
    before = [p.detach().clone() for p in policy.trainable()]
    bare_rollout(policy, condition, [900.0, 500.0, 100.0], chunks)
    bare_update(policy, optimizer, condition, [900.0, 500.0], chunks)
    assert calls == [False] * 6 + [True] * 4
    assert any(not torch.equal(p, b) for p, b in zip(policy.trainable(), before, strict=True))
