"""JSON from files, requests and prompts of others."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Like json.loads, but raises ValueError for any invalid JSON, including JSON that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
