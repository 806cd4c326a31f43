"""Prompts to token ids, without any hub: open_clip carries CLIP's vocabulary, bert_vocab.txt is BERT's."""

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
def mending_tokenizer() -> "SimpleTokenizer":
    """OpenAI's cleaning: ftfy, HTML unescaped twice, whitespace, lower case."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(clean="lower")


@lru_cache(maxsize=1)
def plain_tokenizer() -> "SimpleTokenizer":
    """The cleaning of transformers' fast tokenizer: NFC, whitespace, lower case. Quotes and &amp; stay as they are."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    tokenizer.clean_fn = plain_clean
    return tokenizer


@lru_cache(maxsize=1)
def bert_tokenizer() -> "BertWordPieceTokenizer":
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(BERT_VOCABULARY), lowercase=True)
    tokenizer.enable_truncation(BERT_LENGTH)
    tokenizer.enable_padding(length=BERT_LENGTH)
    return tokenizer


def plain_clean(x: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", x)).strip().lower()


def clip_tokens(prompts: list[str]) -> Tensor:
    """CLIP's ids with OpenAI's cleaning, B prompts -> (B, 77)."""
    return mending_tokenizer()(prompts)


def plain_clip_tokens(prompts: list[str]) -> Tensor:
    """CLIP's ids as transformers makes them, B prompts -> (B, 77)."""
    return plain_tokenizer()(prompts)


def bert_tokens(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """BERT's ids and mask, B prompts -> (B, 35), (B, 35)."""
    found = bert_tokenizer().encode_batch(prompts)
    return tensor([entry.ids for entry in found]), tensor([entry.attention_mask for entry in found])


def distinct(prompts: list[str]) -> tuple[list[str], Tensor]:
    """Each prompt once, and which of them belongs to each image (B,): a group shares its prompt's encoding."""
    unique = list(dict.fromkeys(prompts))
    place = {prompt: n for n, prompt in enumerate(unique)}
    return unique, tensor([place[prompt] for prompt in prompts])
