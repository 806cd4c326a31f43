"""Text files as any editor saves them: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one."""

import codecs
from pathlib import Path

from .errors import ConfigError

MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """The text of a file, with line breaks as \\n. Raises ConfigError for a file that is none."""
    content = path.read_bytes()
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8 or UTF-16 (byte {error.start}: {error.reason}). Save it as UTF-8."
        ) from None
    if "\0" in text:
        raise ConfigError(f"{path} has NUL characters, so it is no text file. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")
