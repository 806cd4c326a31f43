"""Tokenizer and text encoder: CLIP's kind, with a vocabulary of whole words."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from comfyui_pcpo.tiny.captions import VOCABULARY

WIDTH, LENGTH = 128, 16  # a token per word; start and end leave room for 14 words
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-pair encoding trained on the vocabulary alone until each of its words is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([" ".join(VOCABULARY)], trainer)
    trained = json.loads(bpe.to_str())["model"]
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in trained["merges"]]
    pieces += [left + right for left, right in merges if left + right not in pieces]
    vocab = {piece: n for n, piece in enumerate([*pieces, START, END])}  # end has the largest id, as in CLIP
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(tokenizer: Any) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def load_text(shared: Path) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """Tokenizer and trained text encoder, in float32, without gradients."""
    tokenizer = CLIPTokenizer.from_pretrained(shared / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(shared / "text_encoder", torch_dtype=torch.float32)
    return tokenizer, encoder.eval().requires_grad_(False)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, (B,) -> (B, 16)."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
