"""Weight files from the Hugging Face hub, only ever when somebody asks for them: resumed, checked, put in their place.

The hub's own library tells address, size and checksum of a file; the bytes are fetched here, because that library
begins anew where a download was broken off.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from comfyui_pcpo.reward.base import Reward, RewardError, RewardFile
from comfyui_pcpo.reward.weights.checkpoint import file_path

BLOCK, TIMEOUT = 1 << 20, 30.0
Tick = Callable[[RewardFile, int, int | None], None]  # bytes that are here, of how many


def download(
    reward: type[Reward], folder: Path, endpoint: str | None = None, tick: Tick = lambda file, done, size: None
) -> list[Path]:
    """Fetch a reward's weight files; what arrived stays when the line breaks, and the next call goes on from there."""
    return [fetch(file, file_path(folder, file), endpoint, tick) for file in reward.files]


def fetch(file: RewardFile, path: Path, endpoint: str | None, tick: Tick) -> Path:
    """One file of the hub at `path`, its checksum the one that the hub tells. Raises RewardError otherwise."""
    source = f"{file.filename} from {file.hub_id}"
    try:
        told, headers = ask_hub(file, endpoint)
        if path.is_file() and is_whole(path, told.etag, told.size):
            return path
        part = path.with_name(f"{path.name}.{(told.etag or 'file')[:12]}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        receive(Request(told.location, headers=headers), part, told.size, lambda done: tick(file, done, told.size))
    except Exception as error:  # the hub's library and its HTTP client have many kinds
        reason = " ".join(str(error).split())
        raise RewardError(
            f"{source} could not be fetched ({type(error).__name__}: {reason}). "
            "Try again: what arrived is kept, and the download goes on from there."
        ) from error
    if not is_whole(part, told.etag, told.size):
        size = part.stat().st_size
        part.unlink()
        raise RewardError(
            f"{source} arrived with {size} bytes whose checksum is not the hub's {told.etag} ({told.size} bytes). "
            "It was damaged on the way and has been deleted: try again."
        )
    part.replace(path)
    return path


def ask_hub(file: RewardFile, endpoint: str | None) -> tuple[Any, dict[str, str]]:
    """Address, size and checksum of a file, and the headers to fetch it with; a login is shown to the hub only."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file.hub_id, file.filename, endpoint=endpoint)
    told = get_hf_file_metadata(url)
    headers = build_hf_headers() if may_login(url, told.location) else {}
    return told, {**headers, "Accept-Encoding": "identity"}


def may_login(before: str, after: str) -> bool:
    """Whether a login for one address may be shown to the next: the same host and port, and no less encrypted."""
    old, new = urlsplit(before), urlsplit(after)
    return new.netloc == old.netloc and new.scheme in (old.scheme, "https")


class Redirects(HTTPRedirectHandler):
    """Follows redirects as usual, but takes the login along only where it may be shown."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and not may_login(req.full_url, newurl):
            following.remove_header("Authorization")
        return following


def receive(request: Request, part: Path, size: int | None, tick: Callable[[int], None]) -> None:
    """Bring a partial file to its size, trying again as long as every try brings something."""
    while True:
        before = part.stat().st_size if part.is_file() else 0
        if size is not None and before >= size:
            return
        try:
            stream(request, part, before, tick)
        except OSError:
            if not part.is_file() or part.stat().st_size == before:
                raise
            continue
        done = part.stat().st_size
        if size is None or done >= size:
            return
        if done <= before:
            raise OSError(f"{done} of {size} bytes arrived")


def stream(request: Request, part: Path, start: int, tick: Callable[[int], None]) -> None:
    """Append what the server sends from byte `start` on; a server that cannot do so begins anew."""
    if start:
        request.add_header("Range", f"bytes={start}-")
    answers = build_opener(Redirects()).open(request, timeout=TIMEOUT)
    with answers as answer, part.open("ab" if answer.status == 206 else "wb") as file:
        while block := answer.read(BLOCK):
            file.write(block)
            tick(file.tell())


def is_whole(path: Path, etag: str | None, size: int | None) -> bool:
    """Whether a file is what the hub tells of it: SHA-256 of large files, git's SHA-1 of small ones, and the size."""
    if size is not None and path.stat().st_size != size:
        return False
    if etag is None or len(etag) not in (40, 64):  # a mirror that tells no checksum
        return True
    sums = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as opened:
        while block := opened.read(BLOCK):
            sums.update(block)
    return sums.hexdigest() == etag
