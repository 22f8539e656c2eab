"""The studio's page and its two questions, on Starlette and uvicorn."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from elit.studio.studio import Studio

logger = logging.getLogger(__name__)

LONGEST_BODY = 64 * 1024  # bytes


def make_app(studio: Studio) -> Starlette:
    """The page at /, and JSON: /about (GET), /draw and /strip (POST)."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    async def show(_: Request) -> Response:
        return HTMLResponse(page)

    async def about(_: Request) -> Response:
        return JSONResponse(studio.about())

    def answering(answer: Callable[[Any], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                body = b""
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > LONGEST_BODY:
                        raise ValueError(f"the request is longer than {LONGEST_BODY} bytes")
                return JSONResponse(await run_in_threadpool(lambda: answer(_parse(body))))
            except ValueError as error:  # also what a diverged run raises
                return JSONResponse({"error": " ".join(str(error).split())}, 400)

        return endpoint

    return Starlette(routes=[
        Route("/", show),
        Route("/about", about),
        Route("/draw", answering(studio.draw), methods=["POST"]),
        Route("/strip", answering(studio.strip), methods=["POST"]),
    ])  # fmt: skip


def serve(studio: Studio, host: str, port: int) -> None:
    """Serve until it is interrupted."""
    uvicorn.run(make_app(studio), host=host, port=port, log_level="warning")


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is no JSON ({error}); send an object") from error
