"""One update's gradient steps apart from the loop, for tests of its loss and gradient."""

import torch

from comfyui_pcpo.method.branching import branch_rollout
from comfyui_pcpo.method.rollout import GroupNoise, rollout
from trainer.loop.distributed import Processes
from trainer.loop.objectives import make_objective
from trainer.loop.plan import make_plan
from trainer.loop.state import TrainingState, make_training_state
from trainer.loop.update import UpdateBatch, improve
from trainer.policy.loading import make_policy


class UpdateProblem:
    """One update's loss as a function of the LoRA, on a stored rollout, at a LoRA that differs from the rollout's."""

    def __init__(self, config):
        self.config, self.policy = config, make_policy(config)
        self.state = make_training_state(self.policy, config)
        self.generator = torch.Generator().manual_seed(0)
        self.move([0.05 * d for d in self.direction()])
        self.objective = make_objective(config)
        self.plan = make_plan(self.policy, config, self.objective, ["a fox"], 1)
        condition = self.policy.encode(["a fox", "a fox"])
        self.predict = lambda x, t, rows: self.policy.predict(x, t, condition.rows(rows.tolist()))
        noise = GroupNoise([1], 2, self.policy.latent_shape, shared_first=self.plan.branches is not None)
        if self.plan.branches is None:
            path = rollout(self.predict, self.plan.grid, self.plan.transitions, noise, self.plan.minibatches[0])
        else:
            path = branch_rollout(self.predict, self.plan.grid, self.plan.branches, noise, self.plan.minibatches[0])
        self.path = self.objective.prepare(path, self.plan, noise, self.predict)
        self.move([0.02 * d for d in self.direction()])

    def direction(self):
        return [torch.randn(p.shape, generator=self.generator) for p in self.policy.trainable()]

    @torch.no_grad()
    def move(self, direction):
        for p, d in zip(self.policy.trainable(), direction, strict=True):
            p += d

    def run(self, learning_rate, advantage=(1.0, -0.5), failed=None):
        """Plain gradient descent in the optimizer's place: the parameters move by exactly -gradient x rate."""
        sgd = torch.optim.SGD(self.policy.trainable(), lr=learning_rate)
        state = TrainingState(self.policy, sgd, self.state.window)
        failed = None if failed is None else torch.tensor(failed)
        scored = torch.tensor(advantage)
        batch = UpdateBatch(self.plan, self.objective, self.path, scored, self.predict, self.config, failed)
        return improve(state, batch, Processes())

    def gradient(self, *scored):
        before = [p.detach().clone() for p in self.policy.trainable()]
        self.run(1.0, *scored)
        gradient = [old - p.detach() for p, old in zip(self.policy.trainable(), before, strict=True)]
        with torch.no_grad():
            for p, old in zip(self.policy.trainable(), before, strict=True):
                p.copy_(old)
        return gradient

    def slope(self, direction, h):
        """Central difference of fourth order of the loss along `direction`."""
        total = 0.0
        for place, factor in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
            self.move([place * h * d for d in direction])
            total += factor * self.run(0.0).loss
            self.move([-place * h * d for d in direction])
        return total / (12 * h)
