"""A shared prefix changes what is computed, never what is sampled."""

import numpy as np
import pytest
import torch

from comfyui_pcpo.method.branching import Branch, BranchPlan, branch_rollout, choose_branches
from comfyui_pcpo.method.ddim_variance import smallest_target
from comfyui_pcpo.method.rollout import GroupNoise, rollout, rollout_chunks
from comfyui_pcpo.method.samplers import METHODS, default_noise_level, deterministic, transitions
from comfyui_pcpo.method.schedule import ddim_grid, flow_grid

torch.set_num_threads(1)
SHAPE, SIZE, GROUPS = (2, 3, 3), 4, 2


class Model:
    """A smooth nonlinear model with a prompt per group; counts the rows that it predicts."""

    def __init__(self, size=SIZE):
        self.rows, self.size, self.calls = 0, size, []

    def __call__(self, x, t, rows):
        assert len(x) == len(rows)
        self.rows += len(rows)
        self.calls.append((t, rows.tolist()))
        prompt = (rows // self.size).double().view(-1, 1, 1, 1)
        return (0.9 * x + 0.1 * torch.sin(3 * x) + 0.05 * prompt + t / 5000).float()


def setting(method="flow_sde", steps=6):
    grid = ddim_grid(steps) if method == "ddim" else flow_grid(steps)
    return grid, transitions(grid, method, default_noise_level(method)), deterministic(grid)


def noise(shared=True, seeds=(5, 6)):
    return GroupNoise(seeds, SIZE, SHAPE, shared)


def chunks(size, groups=GROUPS, minibatches=1):
    rows = torch.arange(groups * SIZE)
    return [c for part in range(minibatches) for c in rows[rows % minibatches == part].split(size)]


def branched(branches, method="flow_sde", parts=None, model=None, seeds=(5, 6)):
    grid, stochastic, ode = setting(method)
    plan = BranchPlan(branches, stochastic, ode)
    return branch_rollout(model or Model(), grid, plan, noise(seeds=seeds), parts or chunks(8, len(branches)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("start", "length"), [(0, 1), (2, 1), (1, 3)])
def test_a_branch_with_a_shared_prefix_equals_the_same_run_without_sharing(method, start, length):
    grid, stochastic, ode = setting(method)
    window = [s if start <= i < start + length else o for i, (s, o) in enumerate(zip(stochastic, ode, strict=True))]
    slow = rollout(Model(), grid, window, noise(), chunks(8))
    fast = branched([Branch(start, length, g) for g in range(GROUPS)], method)
    torch.testing.assert_close(fast.latents, slow.latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.outs, slow.outs, atol=1e-5, rtol=1e-5)
    assert torch.equal(fast.noises, slow.noises)
    assert fast.evaluations < slow.evaluations == 6 * 8


def test_groups_may_branch_at_different_steps():
    grid, stochastic, ode = setting()
    path = branched([Branch(1, 1, 0), Branch(4, 1, 1)])
    for group, start in enumerate((1, 4)):
        window = [s if i == start else o for i, (s, o) in enumerate(zip(stochastic, ode, strict=True))]
        slow = rollout(Model(), grid, window, noise(), chunks(8))
        rows = slice(group * SIZE, (group + 1) * SIZE)
        torch.testing.assert_close(path.latents[:, rows], slow.latents[:, rows], atol=1e-5, rtol=1e-5)
        images = path.latents[:, rows]
        assert torch.equal(images[: start + 1], images[: start + 1, :1].expand_as(images[: start + 1]))
        assert not torch.equal(images[start + 1, 0], images[start + 1, 1])
    assert path.stochastic is not None
    assert path.stochastic.nonzero().tolist() == [[1, r] for r in range(4)] + [[4, r] for r in range(4, 8)]


def test_model_evaluations_are_one_per_group_up_to_its_branch_and_one_per_image_after():
    model = Model()
    path = branched([Branch(1, 1, 0), Branch(4, 1, 1)], model=model)
    # group 0: steps 0 and 1 once, 2 to 5 four times; group 1: steps 0 to 4 once, 5 four times
    assert path.evaluations == model.rows == (2 + 4 * SIZE) + (5 + 1 * SIZE)


def test_groups_of_one_trunk_share_their_prefix():
    model = Model(2 * SIZE)  # one prompt for both groups
    grid, stochastic, ode = setting()
    plan = BranchPlan([Branch(1, 1, 0), Branch(4, 1, 0)], stochastic, ode)
    path = branch_rollout(model, grid, plan, noise(), chunks(8))
    # step 0 once for both; group 0: step 1 once, 2 to 5 four times; group 1: steps 1 to 4 once, 5 four times
    assert path.evaluations == 1 + (1 + 4 * SIZE) + (4 + SIZE)
    assert torch.equal(path.latents[0], path.latents[0, :1].expand_as(path.latents[0]))
    assert torch.equal(path.latents[1, 0], path.latents[1, SIZE])
    alone = branched([Branch(1, 1, 0)], model=Model(2 * SIZE), seeds=(5,))
    torch.testing.assert_close(path.latents[:, :SIZE], alone.latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("size", [3, 8])
def test_the_update_repeats_the_rollouts_model_calls_and_outputs_to_the_bit(minibatches, size):
    model, parts = Model(), chunks(size, minibatches=minibatches)
    path = branched([Branch(1, 2, 0), Branch(2, 1, 1)], parts=parts, model=model)
    made = [(t, rows) for t, rows in model.calls]
    for i, t in enumerate(path.timesteps):
        for chunk in parts:
            rows = path.drawn(i, chunk)
            if len(rows):
                unique, places = path.unique_rows(i, rows)
                assert (t, unique.tolist()) in made
                assert torch.equal(path.latents[i, unique][places], path.latents[i, rows])
                assert torch.equal(Model()(path.latents[i, unique], t, unique)[places], path.outs[i, rows])


def test_a_plain_rollout_predicts_every_row_and_trains_every_stochastic_step():
    grid, stochastic, _ = setting("cps")
    path = rollout(Model(), grid, stochastic, noise(False), chunks(3))
    rows = torch.tensor([1, 2, 5])
    assert path.unique_rows(0, rows)[0].tolist() == [1, 2, 5]
    assert path.drawn(0, rows).tolist() == [1, 2, 5]
    assert path.drawn(5, rows).tolist() == []  # cps ends without noise
    assert path.evaluations == 6 * 8


def test_branch_steps_are_uniform_over_the_trainable_ones():
    rng = np.random.default_rng(0)
    draws = [choose_branches(rng, range(5), 3, 1) for _ in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=5)
    assert np.abs(counts / 1200 - 1).max() < 0.1  # 6,000 draws on 5 steps
    assert all(len(set(steps)) == 3 for steps in draws)
    assert np.abs(np.bincount([steps[0] for steps in draws]) / 400 - 1).max() < 0.2


def test_longer_branches_fit_and_the_first_k_are_kept():
    rng = np.random.default_rng(0)
    assert set(choose_branches(rng, [0, 1, 2, 4, 5], 60, 2)) == {0, 1, 4}
    assert set(choose_branches(rng, range(9), 60, 1, first=4)) == {0, 1, 2, 3}
    assert sorted(choose_branches(rng, [3], 2, 1)) == [3, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: branched([Branch(5, 2, 0), Branch(0, 1, 1)]), "covers steps 5 to 6, but there are steps 0 to 5"),
        (lambda: branched([Branch(0, 1, 0)], parts=chunks(8)), "1 branches for 2 groups"),
        (lambda: branched([Branch(0, 1, 0), Branch(0, 1, 1)], parts=[torch.arange(4)]), "Cover each"),
        (lambda: branched([Branch(5, 1, 0), Branch(0, 1, 1)], "cps"), "step 5 of a branch has std 0"),
        (lambda: choose_branches(np.random.default_rng(0), [0, 2], 1, 2), "has 2 stochastic steps"),
    ],
)
def test_impossible_branches_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_branch_needs_a_shared_first_noise():
    grid, stochastic, ode = setting()
    with pytest.raises(ValueError, match="shared_noise is false"):
        branch_rollout(Model(), grid, BranchPlan([Branch(0, 1, 0)] * 2, stochastic, ode), noise(False), chunks(8))


def test_solved_ddim_sigmas_branch_too():
    grid = ddim_grid(6)
    stochastic = transitions(grid, "ddim", 1.0, "uniform", smallest_target(grid) * 1.01)
    plan = BranchPlan([Branch(2, 1, 0), Branch(3, 1, 1)], stochastic, deterministic(grid))
    path = branch_rollout(Model(), grid, plan, noise(), chunks(8))
    assert path.final.isfinite().all()


def whole(model, parts):
    grid, stochastic, _ = setting()
    return rollout(model, grid, stochastic, noise(False), parts)


def in_chunks(model, parts):
    grid, stochastic, _ = setting()
    return list(rollout_chunks(model, grid, stochastic, noise(False), parts))


def in_branches(model, parts):
    grid, stochastic, ode = setting()
    plan = BranchPlan([Branch(0, 1, g) for g in range(GROUPS)], stochastic, ode)
    return branch_rollout(model, grid, plan, noise(), parts)


@pytest.mark.parametrize("sample", [whole, in_chunks, in_branches])
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6], [*range(9)], []], ids=str)
def test_chunks_that_do_not_cover_each_image_once_are_refused_before_any_model_call(sample, rows):
    model = Model()
    with pytest.raises(ValueError, match=rf"chunks hold {len(rows)} rows, .* the noise has 8\. Cover each"):
        sample(model, [torch.tensor(rows, dtype=torch.long)])
    assert model.calls == []


def test_sampling_chunk_after_chunk_is_the_same_to_the_bit():
    grid, stochastic, _ = setting()
    path = rollout(Model(), grid, stochastic, noise(False), chunks(3))
    *parts, (last, _) = rollout_chunks(Model(), grid, stochastic, noise(False), chunks(3))
    assert len(parts) + 1 == len(chunks(3))
    for one, two in ((path.latents, last.latents), (path.noises, last.noises), (path.outs, last.outs)):
        assert torch.equal(one, two)
    assert path.evaluations == last.evaluations
