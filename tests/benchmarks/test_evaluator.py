"""The evaluation of a model, two LoRAs composed, and the reference loop of the speed measurements."""

import pytest
import torch
from benchmark_grids import SETTING, TASK, small

from benchmarks.speed.reference_loop import bare_rollout, bare_update
from benchmarks.study import two_rewards
from benchmarks.study.cell_config import cell_config
from benchmarks.study.evaluator import EVALUATION_SEED, Evaluation, make_evaluator, ode_images
from benchmarks.study.grid import Cell
from benchmarks.study.recipes import STUDY_PROMPTS
from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.tiny.align import load_image_encoder
from comfyui_pcpo.tiny.tinyeval import HARD, suite_prompts
from tools.tiny.measure import attribute_shares, drawn, verdicts
from trainer.evaluation.metrics import judged
from trainer.evaluation.sampling import Draw, Guide, sample, sampling_policy
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
