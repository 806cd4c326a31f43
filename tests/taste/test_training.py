"""PCPO on a simulated person's votes: the person's true preference rises, with the guard on."""

import pytest
from voters import Voter

from comfyui_pcpo.method.guidance import ImplicitReward
from comfyui_pcpo.reward import RewardSettings, load_reward
from comfyui_pcpo.taste.encoders import tiny_encoder
from comfyui_pcpo.taste.human import HumanVote, VoteSettings
from comfyui_pcpo.taste.votes import VoteFolder
from trainer.config.loading import build
from trainer.evaluation.sampling import Draw, Guide, sample
from trainer.loop.align import Job, align
from trainer.loop.state import make_training_state
from trainer.policy.diffusers_policy import DiffusersPolicy
from trainer.policy.loading import make_policy
from trainer.runs.folder import RunFolder
from trainer.runs.launch import Run

pytestmark = pytest.mark.slow
PROMPTS = ("a fox", "a star", "a house", "a frog")
VOTES, GROUP = 40, 6


def configuration(folder):
    return build(
        {
            "model": {"name": "emoji-flow"},
            "prompts": {"lines": PROMPTS},
            "rollout": {"group_size": GROUP, "prompts_per_update": 4, "steps": 8, "branch": 2},
            "optimizer": {"learning_rate": 5e-3},
            "reward": {"weights": {"human_vote": 1.0}},
            "guard": {"every": 6, "images": 2, "prompts": 4, "action": "warn"},
            "run": {"folder": str(folder), "updates": 12, "save_every": 100, "preview_every": 0},
        },
        "test",
    )


def test_forty_votes_raise_the_true_preference_by_a_standard_deviation(tmp_path):
    truth = load_reward("colorfulness")
    voter = Voter(lambda images: truth.score(images.float() / 255, [""] * len(images)), error=0.1)
    settings = VoteSettings(VoteFolder(tmp_path / "votes"), choose="ranking", votes=VOTES)
    human = HumanVote(voter, settings, lambda: tiny_encoder(RewardSettings()))
    config = configuration(tmp_path / "runs")
    state = make_training_state(make_policy(config), config)
    with Run(RunFolder(tmp_path / "runs" / "run"), state, Job(config, PROMPTS, {"human_vote": human})) as run:
        for update in align(run.state, run.job):
            run.keep(update)
        guard = run.guard
    assert len(voter.asked) == VOTES
    assert guard is not None and not guard.stopped

    policy, draw = state.policy, Draw(seed=5, steps=8, each=8)
    assert isinstance(policy, DiffusersPolicy)
    trained = [Guide(policy.lora(), ImplicitReward(1.0))]
    images = [sample(policy, PROMPTS, guides, draw) for guides in ([], trained)]
    before, after = (truth.score(x, [""] * len(x)).view(len(PROMPTS), -1) for x in images)
    assert after.mean() - before.mean() >= before.std(1).mean()
