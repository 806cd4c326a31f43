"""PCPO, Proportionate Credit Policy Optimization: the method as pure functions on torch.

Shapes in docstrings: B images, G images per prompt, P prompts, T denoising steps, C H W latent.
"""
