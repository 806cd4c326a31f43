"""Questions to the person in front of ComfyUI's page, over routes of its own server.

GET  /pcpo/vote                the open question, or {"open": false}
GET  /pcpo/vote/ID/N.png       its image N, from 0
POST /pcpo/vote/ID             {"ranks": [0, 1, 1], "seconds": 2.5}, or {"action": "skip" | "undo" | "finish"}

The event `pcpo.vote` on the page's WebSocket says that the question has changed. docs/votes.md is for API clients.
"""

from typing import Any

import comfy.model_management as mm
from aiohttp import web
from server import PromptServer

from comfyui_pcpo.taste.booth import Booth, NotOpen
from comfyui_pcpo.taste.votes import VoteError

EVENT, ADDRESS = "pcpo.vote", "/pcpo/vote"


def server() -> Any:
    """ComfyUI's server. Raises VoteError where nodes are executed without one."""
    instance = getattr(PromptServer, "instance", None)
    if instance is None:
        raise VoteError("A person can only be asked in a running ComfyUI. Start its server, and open its page.")
    return instance


def announce(is_open: bool) -> None:
    server().send_sync(EVENT, {"open": is_open})


BOOTH = Booth(announce, mm.throw_exception_if_processing_interrupted)


def register_routes() -> None:
    """Add the routes to ComfyUI's server; nothing where there is none."""
    if getattr(PromptServer, "instance", None) is None:
        return
    routes = server().routes

    @routes.get(ADDRESS)
    async def question(request: web.Request) -> web.Response:
        return web.json_response(BOOTH.tree(ADDRESS), headers={"Cache-Control": "no-store"})

    @routes.get(ADDRESS + r"/{key}/{number:\d+}.png")
    async def image(request: web.Request) -> web.Response:
        try:
            content = BOOTH.image(request.match_info["key"], int(request.match_info["number"]))
        except NotOpen as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.Response(body=content, content_type="image/png")

    @routes.post(ADDRESS + "/{key}")
    async def answer(request: web.Request) -> web.Response:
        try:
            BOOTH.answer(request.match_info["key"], await request.json())
        except NotOpen as error:
            return web.json_response({"error": str(error)}, status=409)
        except ValueError as error:  # VoteError, or no JSON
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({"accepted": True})
