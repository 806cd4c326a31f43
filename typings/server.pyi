from typing import Any

class PromptServer:
    instance: PromptServer
    routes: Any
    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None: ...
