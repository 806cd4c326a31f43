"""JSON from files, requests and prompts of others."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """As json.loads, but every text that is not JSON is a ValueError, one that is nested too deeply too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
