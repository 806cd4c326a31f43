"""A prompt with metadata for rewards, such as the objects that GenEval looks for."""

import json
from typing import Any

from comfyui_pcpo.json_text import parse_json


class Prompt(str):
    """A prompt's text, with metadata beside it; anything that takes a prompt takes it as a plain string."""

    metadata: dict[str, Any]

    def __new__(cls, text: str, metadata: dict[str, Any] | None = None) -> "Prompt":
        self = super().__new__(cls, text)
        self.metadata = metadata or {}
        return self


def metadata_of(prompt: str) -> dict[str, Any]:
    """The metadata of a prompt; empty for a plain string."""
    return prompt.metadata if isinstance(prompt, Prompt) else {}


def prompt_line(prompt: str) -> str:
    """The line of a prompt list that is read as this prompt: its text where possible, otherwise a JSON object."""
    metadata = metadata_of(prompt)
    if metadata or not is_own_line(prompt):
        return json.dumps({"prompt": str(prompt), **metadata}, ensure_ascii=False)
    return str(prompt)


def is_own_line(text: str) -> bool:
    """Whether a line of this text is read as the text: not as a comment, an object or several lines."""
    try:
        return not text.startswith("#") and len(text.splitlines()) <= 1 and parse_line(text) == text
    except ValueError:
        return False


def parse_line(line: str) -> str:
    """A prompt from a line of text, or from a JSON object {"prompt": ..., other keys: metadata}.

    Raises ValueError for a JSON object without a prompt. Other text in braces, such as {red|blue} fox, is text.
    """
    try:
        entry = parse_json(line) if line.startswith("{") else line
    except ValueError:
        return line
    return entry if isinstance(entry, str) else from_object(entry)


def from_object(entry: Any) -> str:
    """A prompt from {"prompt": ..., other keys: metadata}. Raises ValueError for anything else."""
    text = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError('has no text under "prompt". Write {"prompt": "a red fox", ...}')
    return Prompt(text.strip(), {key: value for key, value in entry.items() if key != "prompt"})


def require_text(text: str) -> None:
    """Raise ValueError for what no path, prompt or file can have: NUL, and half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has a broken character, {text[error.start]!a}. Write it in UTF-8") from None
    if "\0" in text:
        raise ValueError("has NUL characters. Remove them")
