"""Lists of prompts: text with one prompt per line, jsonl and CSV with metadata for rewards."""

import csv
from collections.abc import Callable
from pathlib import Path

from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.prompt import Prompt, from_object, parse_line, prompt_line, require_text

from .errors import ConfigError
from .text_files import parse_csv, read_text


def read_prompt_file(file: Path) -> list[str]:
    """The prompts of a file. Raises ConfigError with the line that cannot be read.

    .jsonl: a string or an object {"prompt": ..., metadata} per line; .csv with a column `prompt`: the other columns are
    metadata; any other file: a prompt per line.
    """
    text = read_text(file)
    if file.suffix.lower() == ".csv" and "prompt" in next(csv.reader(text.split("\n")[:1]), []):
        return [from_row(row) for row in parse_csv(text, file) if row["prompt"].strip()]
    parse = from_json if file.suffix.lower() == ".jsonl" else parse_line
    return parse_lines(text.split("\n"), parse, str(file))


def parse_lines(lines: list[str], parse: Callable[[str], str] = parse_line, source: str = "prompts.lines") -> list[str]:
    """Prompts without blank lines and comments. Raises ConfigError that names the line."""
    prompts = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            prompts.append(parse(text))
            require_text(prompt_line(prompts[-1]))
        except ValueError as error:
            raise ConfigError(f"{source}: line {number} {error}.") from None
    return prompts


def from_json(line: str) -> str:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f'is not JSON ({error}). Write {{"prompt": "a red fox", ...}}') from None
    return entry.strip() if isinstance(entry, str) and entry.strip() else from_object(entry)


def from_row(row: dict[str, str]) -> str:
    """A prompt, on one line, from a CSV row; empty cells and cells beyond the header are left out."""
    text = " ".join(row["prompt"].split())
    return Prompt(text, {key: cell for key, cell in row.items() if key and key != "prompt" and cell})
