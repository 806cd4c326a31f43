from typing import Any

class Request:
    match_info: dict[str, str]
    async def json(self) -> Any: ...

class Response:
    def __init__(self, *, body: bytes | None = None, status: int = 200, content_type: str | None = None) -> None: ...

def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response: ...
