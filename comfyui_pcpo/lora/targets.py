"""Which layers get a LoRA, by their names in diffusers or in ComfyUI.

The names are read by their parts, so that a model without an entry anywhere gets the same layers: attention and
feed-forward of the repeated blocks, but no embeddings, modulations or projections around the blocks.
"""

import re

_BLOCK = r"(?:.*\.)?(?:block)?\d+\.(?:.*\.)?"  # inside a numbered block
_WORDS = r"(?:[a-z]+_)*"
PARALLEL_OUT = r"single_transformer_blocks\.\d+\.(?:proj_out|attn\.to_out)"
"""The last layer of FLUX's parallel blocks, of which most inputs are the feed-forward's."""
ATTENTION = (rf"(?!{PARALLEL_OUT}$){_BLOCK}{_WORDS}(?:attn|attention)\d*\..+",)
FEED_FORWARD = (
    rf"{_BLOCK}{_WORDS}(?:ff|ffn|mlp|feed_forward)(?:_[a-z]+)?\..+",
    rf"{_BLOCK}proj_mlp",
    PARALLEL_OUT,
    r"single_blocks\.\d+\.linear[12]",  # attention and feed-forward of a parallel block in one
)
CONVOLUTIONS = (r"(?:.*\.)?(?:conv1|conv2)",)
OTHERS = r".*(?:modulation|adaln|llm_adapter)"  # modulations of attention; Anima's adapter, which maps the prompt
TARGETS = {
    name: re.compile(rf"(?!{OTHERS})(?:{'|'.join(layers)})")
    for name, layers in {
        "attention": ATTENTION,
        "linear": (*ATTENTION, *FEED_FORWARD),
        "all": (*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS),
    }.items()
}


def is_target(name: str, targets: str) -> bool:
    """Whether `lora.targets` covers the Linear or convolution of that name."""
    return TARGETS[targets].fullmatch(name) is not None
