"""ComfyUI's prompt syntax, which only its text encoders understand."""

from comfy.sd1_clip import escape_important, token_weights, unescape_important


def plain_prompt(text: str) -> str:
    """A prompt without weights, as a reward reads it: "(a fox:1.3)" -> "a fox"."""
    return unescape_important("".join(part for part, _ in token_weights(escape_important(text), 1.0)))
