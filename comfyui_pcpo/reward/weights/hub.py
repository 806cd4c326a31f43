"""Downloads weight files from the Hugging Face hub, on request only, with resume and checksum.

huggingface_hub looks up URL, size and checksum of a file; the bytes are fetched here, because that library restarts an
interrupted download from the beginning.
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
Tick = Callable[[RewardFile, int, int | None], None]  # file, bytes received, total size


def download(
    reward: type[Reward], folder: Path, endpoint: str | None = None, tick: Tick = lambda file, done, size: None
) -> list[Path]:
    """Download a reward's weight files; an interrupted download is resumed by the next call."""
    return [fetch(file, file_path(folder, file), endpoint, tick) for file in reward.files]


def fetch(file: RewardFile, path: Path, endpoint: str | None, tick: Tick) -> Path:
    """Download one file and verify size and checksum before it replaces `path`. Raises RewardError on failure."""
    source = f"{file.filename} from {file.hub_id}"
    try:
        metadata, headers = ask_hub(file, endpoint)
        if path.is_file() and is_intact(path, metadata.etag, metadata.size):
            return path
        check_size(file, metadata.size)
        part = path.with_name(f"{path.name}.{(metadata.etag or 'file')[:12]}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        request = Request(metadata.location, headers=headers)
        receive(request, part, metadata.size, lambda done: tick(file, done, metadata.size))
    except RewardError:
        raise
    except Exception as error:  # huggingface_hub and its HTTP client raise many types
        reason = " ".join(str(error).split())
        raise RewardError(
            f"{source} could not be fetched ({type(error).__name__}: {reason}). "
            "Try again: the download resumes where it stopped."
        ) from error
    if not is_intact(part, metadata.etag, metadata.size):
        size = part.stat().st_size
        part.unlink()
        raise RewardError(
            f"{source} has {size} bytes whose checksum is not the hub's {metadata.etag} ({metadata.size} bytes). "
            "The damaged download has been deleted: try again."
        )
    check_size(file, part.stat().st_size, part)
    part.replace(path)
    return path


def check_size(file: RewardFile, size: int | None, part: Path | None = None) -> None:
    """Raise RewardError if a file is far from its known size, as an error page of a mirror is; delete its download."""
    if size is None or file.bytes / 2 <= size <= file.bytes * 2:
        return
    if part is not None:
        part.unlink()
    raise RewardError(
        f"{file.filename} from {file.hub_id} has {size} bytes there, but about {file.bytes} are expected, so it is "
        "another file. Nothing was replaced. Check the mirror (--endpoint), or use the hub."
    )


def ask_hub(file: RewardFile, endpoint: str | None) -> tuple[Any, dict[str, str]]:
    """URL, size and checksum of a file, and request headers; the access token is sent to the hub only."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file.hub_id, file.filename, endpoint=endpoint)
    metadata = get_hf_file_metadata(url)
    headers = build_hf_headers() if may_send_token(url, metadata.location) else {}
    return metadata, {**headers, "Accept-Encoding": "identity"}


def may_send_token(before: str, after: str) -> bool:
    """Whether a token for one URL may be sent to the next: same host and port, and no downgrade from https."""
    old, new = urlsplit(before), urlsplit(after)
    return new.netloc == old.netloc and new.scheme in (old.scheme, "https")


class Redirects(HTTPRedirectHandler):
    """Follows redirects, but drops the access token where it may not be sent."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and not may_send_token(req.full_url, newurl):
            following.remove_header("Authorization")
        return following


def receive(request: Request, part: Path, size: int | None, tick: Callable[[int], None]) -> None:
    """Complete a partial file, retrying as long as every attempt makes progress."""
    while True:
        before = part.stat().st_size if part.is_file() else 0
        if size is not None and before >= size:
            return
        try:
            stream(request, part, before, tick)
        except OSError:
            if not part.is_file() or part.stat().st_size <= before:
                raise
            continue
        done = part.stat().st_size
        if size is None or done >= size:
            return
        if done <= before:
            raise OSError(f"received {done} of {size} bytes")


def stream(request: Request, part: Path, start: int, tick: Callable[[int], None]) -> None:
    """Append the file from byte `start` on; start over if the server does not support ranges."""
    if start:
        request.add_header("Range", f"bytes={start}-")
    response = build_opener(Redirects()).open(request, timeout=TIMEOUT)
    with response, part.open("ab" if response.status == 206 else "wb") as file:
        while block := response.read(BLOCK):
            file.write(block)
            tick(file.tell())


def is_intact(path: Path, etag: str | None, size: int | None) -> bool:
    """Whether size and checksum match the hub's: SHA-256 for large files, git's SHA-1 for small ones."""
    if size is not None and path.stat().st_size != size:
        return False
    if etag is None or len(etag) not in (40, 64):  # a mirror without checksums
        return True
    sums = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as opened:
        while block := opened.read(BLOCK):
            sums.update(block)
    return sums.hexdigest() == etag
