"""A policy inside ComfyUI's sampling, and gradients through it against finite differences."""

import comfy_host
import torch

comfy_host.load_pack()
comfy_policy = comfy_host.pack_module("nodes.host.policy")


def inside(setup, c, work):
    """`work(policy)` where training happens: inside guider.sample()."""
    return comfy_policy.with_policy(setup.model, setup.vae, setup.prompts, c, setup.latent(1)["samples"], work)


def random_pairs(pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: tuple(torch.randn(t.shape, generator=generator) * 0.05 for t in pair) for k, pair in pairs.items()}


def factors(policy, pairs):
    """(parameter, tensor of `pairs`) for both factors of every module."""
    for name, pair in pairs.items():
        layer = policy.layers[name]
        yield from zip((layer.down, layer.up), pair, strict=True)


def finite_difference(policy, steps=4, size=0.02):
    """Derivative of a smooth loss along a direction: by backward, and by a difference of fourth order.

    Half of the direction is random; the other half is the computed gradient, because along a random one alone
    the derivative may be so near to 0 that float32's rounding of the loss is more than a thousandth of it.
    """
    t = policy.grid(steps).timesteps.tolist()[1]
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    start, direction = random_pairs(policy.lora()), random_pairs(policy.lora(), 9)
    rows = policy.encode([policy.lines[0]]).rows([0, 0])

    def loss():
        return (policy.predict(x, t, rows) * along).sum()

    def moved(amount):
        policy.load_lora({k: tuple(a + amount * b for a, b in zip(start[k], direction[k], strict=True)) for k in start})
        with torch.no_grad():
            return float(loss().double())

    policy.load_lora(start)
    loss().backward()
    pairs = list(factors(policy, direction))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p, _ in pairs]
    lengths = [torch.cat([t.flatten() for t in part]).norm() for part in ([d for _, d in pairs], gradients)]
    for (_, d), gradient in zip(pairs, gradients, strict=True):
        d += gradient * (lengths[0] / lengths[1])
    slope = sum(float((gradient * d).sum()) for gradient, (_, d) in zip(gradients, pairs, strict=True))
    near, far = (moved(n * size) - moved(-n * size) for n in (1, 2))
    return slope, (8 * near - far) / (12 * size)
