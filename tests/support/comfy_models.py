"""The embedded models for the tests of the nodes, and sampling from them."""

import copy

import comfy_host
import torch

comfy_host.load_pack()
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
from comfy.patcher_extension import CallbacksMP  # noqa: E402

from comfyui_pcpo.lora.families import detect_family  # noqa: E402
from comfyui_pcpo.lora.formats import export_state  # noqa: E402
from comfyui_pcpo.tiny import pipelines  # noqa: E402

steps = comfy_host.pack_module("nodes.host.samplers")
LINES = ("a red fox", "a blue rocket")


class Tiny:
    """An embedded model in ComfyUI and in diffusers."""

    def __init__(self, name):
        self.name = name
        self.model, self.clip, self.vae = comfy_host.execute("PCPOLoadTinyModel", name)
        self.positive, self.negative = self.encode("a red fox"), self.encode("")
        self.pipeline = pipelines.load_tiny(name, pipelines.MODELS)
        self.prompts = comfy_host.execute("PCPOPrompts", self.clip, "\n".join(LINES), "")[0]
        self.reward = comfy_host.execute("PCPOLoadReward", "colorfulness")[0]

    def on(self, model):
        """A copy with another MODEL."""
        other = copy.copy(self)
        other.model = model
        return other

    def encode(self, text):
        with torch.inference_mode():
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def latent(self, count=2, side=8):
        """An empty latent; half the models' own size by default, which is faster."""
        return {"samples": torch.zeros(count, 16, side, side)}

    def train(self, name, updates=2, **widgets):
        """Train LoRA (PCPO, GRPO), by default without guard and branches -> (lora, loss_map, steps, run)."""
        small = {"prompts_per_update": 2, "group_size": 4, "steps": 4, "rank": 4, "learning_rate": 3e-3}
        small |= {"guard_every": 0, "branch": 0}
        return comfy_host.execute(
            "PCPOTrainLoRA", model=self.model, vae=self.vae, prompts=self.prompts, reward=self.reward,
            latent_image=self.latent(1), name=name, updates=updates, **{**small, **widgets},
        )  # fmt: skip

    def sigmas(self, scheduler="normal", count=8):
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), scheduler, count)

    def guider(self, model=None, cfg=3.0):
        guider = comfy.samplers.CFGGuider(model or self.model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(cfg)
        return guider

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
    return export_state(pairs, 4.0, 4, "comfyui", detect_family(pairs))


def lora_on(tiny, seed, model=None, strength=1.0):
    """A MODEL with a random LoRA applied by ComfyUI's loader."""
    return comfy_host.execute("LoraModelLoader", model or tiny.model, random_lora(tiny, seed), strength)[0]


def partly_loaded(model):
    """A MODEL that ComfyUI offloads completely after loading, so that weights are patched when they are used."""
    offloaded = model.clone()
    offloaded.add_callback(CallbacksMP.ON_LOAD, lambda own, *_: own.partially_unload(own.offload_device, 1e12))
    return offloaded


class Moved(comfy.model_patcher.ModelPatcher):
    """A MODEL whose weights get new storage on loading and unloading, as between a CPU and a GPU."""

    moves = 0

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        self.move()

    def detach(self, *args, **kwargs):
        result = super().detach(*args, **kwargs)
        self.move()
        return result

    def move(self):
        Moved.moves += 1
        for parameter in self.model.parameters():
            with torch.no_grad():
                parameter.data = parameter.detach().clone()


def forget_loaded():
    """Unload all models, so that the next load starts from scratch."""
    comfy.model_management.unload_all_models()
