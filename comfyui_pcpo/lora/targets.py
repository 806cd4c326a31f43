"""Which layers a LoRA goes to, by their names in diffusers."""

import re

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = tuple(f"{ff}.{layer}" for ff in ("ff", "ff_context", "img_mlp", "txt_mlp") for layer in
                     ("net.0.proj", "net.2"))  # fmt: skip
SINGLE = ("proj_mlp",)
CONVOLUTIONS = ("conv1", "conv2")
TARGETS = {"attention": ATTENTION, "linear": (*ATTENTION, *FEED_FORWARD, *SINGLE)}
TARGETS["all"] = (*TARGETS["linear"], *CONVOLUTIONS)
SINGLE_OUT = re.compile(r"single_transformer_blocks\.\d+\.proj_out$")
"""FLUX's single blocks end in a feed-forward layer that has a UNet projection's name."""


def is_target(name: str, targets: str) -> bool:
    """Whether `lora.targets` covers the module of that name."""
    if targets != "attention" and SINGLE_OUT.match(name):
        return True
    return name.endswith(tuple("." + suffix for suffix in TARGETS[targets]))
