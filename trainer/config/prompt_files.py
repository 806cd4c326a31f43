"""Lists of prompts: text with one prompt per line, jsonl and CSV with metadata for rewards."""

import csv
import re
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
    if file.suffix.lower() == ".csv":
        table = text.lstrip("\n")  # as the reader of CSV sees it
        column = prompt_column(table.split("\n")[0], file)
        if column is not None:
            return [from_row(row, column) for row in parse_csv(table, file) if row[column].strip()]
    parse = from_json if file.suffix.lower() == ".jsonl" else parse_line
    return parse_lines(text.split("\n"), parse, str(file))


def prompt_column(line: str, file: Path) -> str | None:
    """Which column of a CSV's header, in any case, has the prompts; None for a line that is no header.

    Raises ConfigError for a header that the comma does not split, which would be trained as a prompt.
    """
    named = [name for name in split_row(line) if name.strip().lower() == "prompt"]
    if len(named) > 1:
        raise ConfigError(f"{file} has {len(named)} columns of prompts: {', '.join(named)}. Rename all but one.")
    if named:
        return named[0]
    cells = {cell.strip(" \"'").lower() for cell in re.split(r"[,;|\t]", line)}
    if cells & {"prompt", "prompts"}:
        raise ConfigError(
            f"{file}: the first line {line.strip()!r} looks like a header, but a CSV file's columns are split by "
            "commas, and that of the prompts is called prompt. Save it so, or without a header, a prompt per line."
        )
    return None


def split_row(line: str) -> list[str]:
    """The cells of a line; none of one that cannot be a header."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # too long
        return []


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


def from_row(row: dict[str, str], column: str) -> str:
    """A prompt, on one line, from a CSV row; empty cells and cells beyond the header are left out."""
    text = " ".join(row[column].split())
    return Prompt(text, {key: cell for key, cell in row.items() if key and key != column and cell})
