"""Models for the nodes' tests: the embedded ones through their node, and how to sample from them."""

import comfy_host
import torch

comfy_host.load_pack()
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

from comfyui_pcpo.lora import export_state, family_of  # noqa: E402
from comfyui_pcpo.tiny import pipelines  # noqa: E402

steps = comfy_host.pack_module("nodes.steps")


class Tiny:
    """An embedded model in the host, and the same one in diffusers."""

    def __init__(self, name):
        self.name = name
        self.model, self.clip, self.vae = comfy_host.execute("PCPOLoadTinyModel", name)
        self.positive, self.negative = self.encode("a red fox"), self.encode("")
        self.pipeline = pipelines.load_tiny(name, pipelines.MODELS)

    def encode(self, text):
        with torch.inference_mode():
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def latent(self, count=2):
        return {"samples": torch.zeros(count, 16, 8, 8)}

    def sigmas(self, scheduler="normal", count=8):
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), scheduler, count)

    def guider(self, model=None, cfg=3.0):
        found = comfy.samplers.CFGGuider(model or self.model)
        found.set_conds(self.positive, self.negative)
        found.set_cfg(cfg)
        return found

    def stock(self, sigmas=None, model=None, **how):
        """ComfyUI's own deterministic sampler."""
        guider = self.guider(model, how.pop("cfg", 3.0))
        return sample(guider, self.sigmas() if sigmas is None else sigmas, **{"latent": self.latent(), **how})

    def ours(self, choice, sigmas=None, **how):
        guider, sampler = self.guider(cfg=how.pop("cfg", 1.0)), steps.StochasticSampler(choice)
        sigmas = self.sigmas() if sigmas is None else sigmas
        return sample(guider, sigmas, **{"latent": self.latent(), "sampler": sampler, **how})

    def ksample(self, **changes):
        """PCPO KSampler -> (latent, trajectory)."""
        given = {
            "model": self.model, "seed": 3, "steps": 6, "cfg": 1.0, "scheduler": "training", "positive": self.positive,
            "negative": self.negative, "latent_image": self.latent(), "denoise": 1.0, "method": "auto",
            "noise_level": -1.0,
        }  # fmt: skip
        latent, trajectory = comfy_host.execute("PCPOKSampler", **{**given, **changes})
        return latent["samples"], trajectory


def sample(guider, sigmas, latent, sampler=None, seed=3, callback=None):
    samples = latent["samples"]
    noise = comfy.sample.prepare_noise(samples, seed)
    sampler = sampler or comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, samples, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed)


def biggest(a, b):
    return (a.float() - b.float()).abs().max().item()


def random_lora(tiny, seed, size=0.05):
    """A random LoRA under ComfyUI's names."""
    generator = torch.Generator().manual_seed(seed)
    core = tiny.pipeline.unet if tiny.name == "emoji-eps" else tiny.pipeline.transformer
    pairs = {}
    for name, module in core.named_modules():
        if name.endswith(("to_q", "to_v", "to_out.0", "ff.net.2")):
            shapes = (4, module.in_features), (module.out_features, 4)
            pairs[name] = tuple(torch.randn(shape, generator=generator) * size for shape in shapes)
    return export_state(pairs, 4.0, 4, "comfyui", family_of(pairs))


def lora_on(tiny, seed, model=None, strength=1.0):
    """A MODEL behind the host's own LoRA loader."""
    return comfy_host.execute("LoraModelLoader", model or tiny.model, random_lora(tiny, seed), strength)[0]
