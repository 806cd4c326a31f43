"""One open question at a time, between the thread that asks and whoever serves the page.

Both ComfyUI's routes and the page of `pcpo ab` show `Booth.tree`, serve `Booth.image`, and hand answers to
`Booth.answer`; docs/votes.md describes the requests.
"""

import io
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from comfyui_pcpo.taste.human import Question, Reply
from comfyui_pcpo.taste.votes import VoteError, check_ranks

CANCEL_POLL = 0.1  # seconds between two checks whether the user has cancelled


class NotOpen(LookupError):
    """An answer to a question that is not open any more."""


@dataclass
class Ballot:
    """An open question, who asks it, and the reply."""

    key: str
    asker: str
    question: Question
    reply: Reply | None = None

    def tree(self, address: str) -> dict[str, Any]:
        """The question as the page gets it; its images are found below `address`."""
        q = self.question
        return {
            "open": True,
            "id": self.key,
            "node": self.asker,
            "question": q.text,
            "prompt": q.prompt,
            "choose": q.choose,
            "number": q.number,
            "total": q.total,
            "can_undo": q.can_undo,
            "can_finish": q.can_finish,
            "images": [f"{address}/{self.key}/{n}.png" for n in range(len(q.images))],
        }

    def read(self, body: Any) -> Reply:
        """The reply in a request. Raises VoteError."""
        if not isinstance(body, dict):
            raise VoteError('The answer is not a JSON object. Send {"ranks": [...]} or {"action": "skip"}.')
        action = body.get("action", "vote")
        allowed = {"vote": True, "skip": True, "undo": self.question.can_undo, "finish": self.question.can_finish}
        if not isinstance(action, str) or not allowed.get(action, False):
            possible = ", ".join(name for name, fits in allowed.items() if fits)
            raise VoteError(f"The action {action!r} is not possible for this question. Use one of {possible}.")
        if action == "undo" or action == "finish":
            return Reply(action)
        ranks = body.get("ranks", []) if action == "vote" else []
        if not isinstance(ranks, list) or (action == "vote" and not ranks):
            raise VoteError("The answer has no list of ranks. Send one number per image, 0 for the best, or skip.")
        return Reply("vote", check_ranks(ranks, len(self.question.images)), seconds_of(body))


def seconds_of(body: dict[str, Any]) -> float:
    seconds = body.get("seconds", 0.0)
    return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e6 else 0.0


class Booth:
    """`changed` is called after a question opens or closes, `tick` while waiting; `tick` may raise to give up."""

    def __init__(self, changed: Callable[[bool], None], tick: Callable[[], None]):
        self.changed, self.tick = changed, tick
        self.replied = threading.Condition()
        self.ballot: Ballot | None = None

    def ask(self, asker: str, question: Question) -> Reply:
        """Show a question and wait for the reply."""
        ballot = Ballot(secrets.token_hex(8), asker, question)
        self._show(ballot)
        try:
            while ballot.reply is None:
                self.tick()
                with self.replied:
                    self.replied.wait_for(lambda: ballot.reply is not None, CANCEL_POLL)
            return ballot.reply
        finally:
            self._show(None)

    def _show(self, ballot: Ballot | None) -> None:
        self.ballot = ballot
        self.changed(ballot is not None)

    def open_ballot(self, key: str) -> Ballot:
        """The open question, if that is its key. Raises NotOpen."""
        ballot = self.ballot
        if ballot is None or ballot.key != key or ballot.reply is not None:
            raise NotOpen("This question is not open any more. Get the open one, and answer that.")
        return ballot

    def tree(self, address: str) -> dict[str, Any]:
        """The open question, or {"open": False}."""
        ballot = self.ballot
        return {"open": False} if ballot is None or ballot.reply is not None else ballot.tree(address)

    def image(self, key: str, number: int) -> bytes:
        """An image of the open question as PNG. Raises NotOpen."""
        images = self.open_ballot(key).question.images
        if not 0 <= number < len(images):
            raise NotOpen(f"The question has the images 0 to {len(images) - 1}.")
        buffer = io.BytesIO()
        Image.fromarray(images[number].numpy()).save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def answer(self, key: str, body: Any) -> None:
        """Hand a reply to the asking thread. Raises VoteError or NotOpen."""
        with self.replied:
            ballot = self.open_ballot(key)
            ballot.reply = ballot.read(body)
            self.replied.notify_all()
