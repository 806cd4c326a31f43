"""Chroma: FLUX.1 without pooled text and distilled guidance; texts are cut after their first padding token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config.schema import ConfigError
from .base import Inputs
from .flux import T5_TOKENS, Flux, pack, position_ids, unpack


class Chroma(Flux):
    """Padding is cut instead of masked, so images share a model call where their texts have one length.

    ChromaPipeline passes its mask as numbers, which attention adds instead of masking with them, and the transformer
    leaves it out where blocks are checkpointed; without padding neither matters.
    """

    def check_sharded(self) -> None:
        r = self.rollout
        calls = r.cfg == 1 or not r.batch_cfg or r.detach_unconditional
        if r.images_at_once > 1 or not calls:
            raise ConfigError(
                f"model.shard with Chroma needs rollout.images_at_once = 1 (it is {r.images_at_once}) and "
                f"rollout.batch_cfg = false (it is {str(r.batch_cfg).lower()}): texts of different lengths take calls "
                "of their own, and all processes must make the same calls. Set them, or use model.quantize."
            )

    def embed(self, prompts: Sequence[str], device: torch.device) -> Inputs:
        tokenizer = self.pipeline.tokenizer
        most = min(T5_TOKENS, tokenizer.model_max_length)
        hidden, *_ = self.pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=most
        )
        tokens = tokenizer(list(prompts), truncation=True, max_length=most).input_ids
        return {"texts": [row[: len(ids) + 1] for row, ids in zip(hidden, tokens, strict=True)]}

    def call(self, x: Tensor, t: Tensor, text: Inputs) -> Tensor:
        outs: dict[int, Tensor] = {}
        for length in {len(row): None for row in text["texts"]}:
            rows = [i for i, row in enumerate(text["texts"]) if len(row) == length]
            hidden = torch.stack([text["texts"][i] for i in rows])
            outs |= zip(rows, self._velocity(torch.stack([x[i] for i in rows]), t[: len(rows)], hidden), strict=True)
        return torch.stack([outs[i] for i in range(len(x))])

    def _velocity(self, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        out = self.denoiser(
            pack(x),
            encoder_hidden_states=hidden,
            timestep=t / 1000,
            img_ids=position_ids(h, w, x.device),
            txt_ids=torch.zeros(hidden.shape[1], 3, device=x.device),
        )
        return unpack(out.sample.float(), h, w)
