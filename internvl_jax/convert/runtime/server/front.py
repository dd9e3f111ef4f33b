"""Around every request: its id, its key, its errors, its count."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Refusal
from .metrics import Metrics

log = logging.getLogger("internvl.server")

OPEN = {"/health", "/ready"}
"""What is answered without a key: an orchestrator's probes."""
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
CLIENT_GONE = 499


class Front:
    """A middleware around all of the endpoints.

    Args:
        app: what answers.
        metrics: counts every answer.
        routes: paths that are counted under their own name, the others as "other".
        keys: of which each request must bring one as ``Authorization: Bearer``; none asks for none.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Sequence[str], keys: Sequence[str] = ()
    ):
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.monotonic(), 0
        headers = dict(scope["headers"])
        name = _request_id(headers.get(b"x-request-id", b""))

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            try:
                if scope["path"] not in OPEN:
                    self._check(headers)
                await self._app(scope, receive, sending)
            except Refusal as refusal:
                await refused(refusal)(scope, receive, sending)
            except ClientDisconnect:
                status = CLIENT_GONE
            except Exception:
                log.exception("Request %s failed.", name)
                if status:
                    raise  # a part of the answer is out: all that is left is to hang up
                message = f"The server failed: its log says why under the request id {name}."
                await refused(Refusal(500, message))(scope, receive, sending)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.request(route, status or CLIENT_GONE, time.monotonic() - start)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        if not self._keys and b"origin" in headers:
            # Else any page could use a server on its reader's own machine, by a name of its own
            # that it lets point there.
            raise Refusal(403, "Pages in a browser can use this server only if it asks for a key.")
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        # Every key is compared, so the time tells nothing about them.
        found = sum(hmac.compare_digest(given, known) for known in self._keys)
        if self._keys and not (found and scheme.lower() == b"bearer"):
            raise Refusal(
                401,
                "This server asks for a key: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def refused(refusal: Refusal) -> JSONResponse:
    """A refusal in the form of OpenAI's errors."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    error = {
        "message": refusal.message,
        "type": kind,
        "param": refusal.param,
        "code": refusal.code,
    }
    return JSONResponse({"error": error}, refusal.status, refusal.headers)


async def on_refusal(request: Request, error: Exception) -> JSONResponse:
    """An exception handler for `Refusal`."""
    assert isinstance(error, Refusal)
    return refused(error)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """An exception handler for the framework's own 404 and 405."""
    status = getattr(error, "status_code", 500)
    meaning = {
        404: "There is no such endpoint: GET /openapi.json lists them.",
        405: "The endpoint does not know this method: GET /openapi.json lists what it knows.",
    }
    message = meaning.get(status, f"The request failed with status {status}.")
    return refused(Refusal(status, message, headers=getattr(error, "headers", None)))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    return text if REQUEST_ID.fullmatch(text) else uuid.uuid4().hex
