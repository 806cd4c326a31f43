"""Tokenizers that need no hub access: open_clip includes CLIP's vocabulary, bert_vocab.txt is BERT's."""

import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, tensor

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import BertWordPieceTokenizer

BERT_VOCABULARY = Path(__file__).parent / "bert_vocab.txt"
BERT_LENGTH = 35


@lru_cache(maxsize=1)
def ftfy_tokenizer() -> "SimpleTokenizer":
    """OpenAI's cleaning: ftfy, HTML unescaped twice, whitespace, lower case."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(clean="lower")


@lru_cache(maxsize=1)
def plain_tokenizer() -> "SimpleTokenizer":
    """The cleaning of transformers' fast tokenizer: NFC, whitespace, lower case. Quotes and &amp; are unchanged."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    tokenizer.clean_fn = plain_clean
    return tokenizer


@lru_cache(maxsize=1)
def bert_tokenizer() -> "BertWordPieceTokenizer":
    """The tokenizer of BERT without case, padded and truncated to BERT_LENGTH."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(BERT_VOCABULARY), lowercase=True)
    tokenizer.enable_truncation(BERT_LENGTH)
    tokenizer.enable_padding(length=BERT_LENGTH)
    return tokenizer


def plain_clean(x: str) -> str:
    """Lower case and single spaces, the cleaning of transformers without ftfy."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", x)).strip().lower()


def clip_tokens(prompts: list[str]) -> Tensor:
    """CLIP token ids with OpenAI's cleaning, B prompts -> (B, 77)."""
    return ftfy_tokenizer()(prompts)


def plain_clip_tokens(prompts: list[str]) -> Tensor:
    """CLIP token ids as in transformers, B prompts -> (B, 77)."""
    return plain_tokenizer()(prompts)


def bert_tokens(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """BERT token ids and mask, B prompts -> (B, 35), (B, 35)."""
    encodings = bert_tokenizer().encode_batch(prompts)
    return tensor([entry.ids for entry in encodings]), tensor([entry.attention_mask for entry in encodings])


def distinct(prompts: list[str]) -> tuple[list[str], Tensor]:
    """Unique prompts and each image's index into them (B,), so that a group encodes its prompt once."""
    unique = list(dict.fromkeys(prompts))
    index = {prompt: n for n, prompt in enumerate(unique)}
    return unique, tensor([index[prompt] for prompt in prompts])
