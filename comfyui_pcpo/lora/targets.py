"""Which layers get a LoRA, by their diffusers names."""

import re

from comfyui_pcpo.lora.families import LORA_FAMILIES

ATTENTION = (r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",)
FEED_FORWARD = (r"(ff|ff_context)\.net\.(0\.proj|2)", *(p for f in LORA_FAMILIES.values() for p in f.feed_forward))
CONVOLUTIONS = (r"(conv1|conv2)",)
TARGETS = {
    name: re.compile(rf"(.*\.)?({'|'.join(layers)})")
    for name, layers in {
        "attention": ATTENTION,
        "linear": (*ATTENTION, *FEED_FORWARD),
        "all": (*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS),
    }.items()
}


def is_target(name: str, targets: str) -> bool:
    """Whether `lora.targets` covers the module of that name."""
    return TARGETS[targets].fullmatch(name) is not None
