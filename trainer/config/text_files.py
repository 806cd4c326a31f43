"""Text files as any editor saves them: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one."""

import codecs
import csv
import io
from pathlib import Path
from typing import Any

from comfyui_pcpo.json_text import parse_json

from .errors import ConfigError

MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """The text of a file, with line breaks as \\n. Raises ConfigError for a file that is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}. Give a text file.") from None
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8 or UTF-16 (byte {error.start}: {error.reason}). Save it as UTF-8."
        ) from None
    if "\0" in text:
        raise ConfigError(f"{path} contains NUL characters, so it is not a text file. Save it as UTF-8.")
    return line_ends(text)


def line_ends(text: str) -> str:
    """A text whose lines all end in a line feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_csv(text: str, path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by its header; missing cells are empty. Raises ConfigError for a quote left open."""
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path} is not CSV: {error}. Close every quote, and write one row per line.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError for anything else."""
    text = read_text(path)
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Restore the file.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} has a {type(tree).__name__} where an object belongs. Restore the file.")
    return tree
