"""The adaptive KL weight: it rises while a policy's KL exceeds a budget, and falls while the KL stays below it."""

FACTOR = 1.5
RANGE = 1000.0
"""The weight stays within this factor of its start: early updates, whose KL is still 0, cannot make it vanish."""


def adapted_kl_weight(weight: float, kl: float, budget: float, start: float) -> float:
    """The KL weight of the next update.

    PPO (arXiv 1707.06347), section 4, with 1.5 in place of its 2:

        beta <- 1.5 beta  if d > 1.5 d_target,      beta <- beta / 1.5  if d < d_target / 1.5
    """
    if kl > FACTOR * budget:
        weight *= FACTOR
    elif kl < budget / FACTOR:
        weight /= FACTOR
    return min(max(weight, start / RANGE), start * RANGE)
