"""What a request may cost, and how it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

from fastapi import Request

RETRY_SECONDS = 1
FORGOTTEN = 16 << 20
"""Bytes of a body beyond its limit that are still read."""


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: one sentence for the client: what is wrong and what to do.
        param: the field it is about.
        code: a word for programs.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


def full(what: str) -> Refusal:
    """The refusal of a server that has too much to do."""
    return Refusal(
        503,
        f"The server is busy ({what}): try again in a moment.",
        code="overloaded",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for. All of it is checked before it costs anything.

    Attributes:
        image_bytes: of one encoded picture.
        image_pixels: of one picture, as its header declares them.
        images: pictures of a request.
        texts: texts of a request, or messages of a conversation.
        text_chars: characters of one text, or of a conversation.
        new_tokens: tokens to generate.
        beams: width of a beam search.
        body_bytes: of a JSON body.
        body_elements: commas and brackets of a JSON body; small values nest and repeat cheaply on
            the wire but not in memory.
        seconds: from the first byte of the body to the answer.
    """

    image_bytes: int = 10 << 20
    image_pixels: int = 40_000_000
    images: int = 16
    texts: int = 128
    text_chars: int = 20_000
    new_tokens: int = 512
    beams: int = 8
    body_bytes: int = 64 << 20
    body_elements: int = 100_000
    seconds: float = 60.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise ValueError(f"The limit {field.name} is no positive number.")


class Budget:
    """An amount that all requests share; the one that would exceed it is refused.

    It bounds the memory of many requests at once, where `Limits` bounds one. Used from the event
    loop only.
    """

    def __init__(self, total: int, what: str):
        self.total, self.what, self.used = total, what, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that takes some of the budget until the block is left.

        Raises:
            Refusal: 503, by that function, where too little is left.
        """
        mine = 0

        def take(amount: int) -> None:
            nonlocal mine
            if self.used + amount > self.total:
                raise full(self.what)
            self.used += amount
            mine += amount

        try:
            yield take
        finally:
            self.used -= mine


async def read_body(request: Request, limit: int, take: Callable[[int], None]) -> bytearray:
    """The body, of which no more than the limit is ever held.

    Args:
        request: its body is not read yet.
        limit: bytes.
        take: called with every number of bytes before they are kept, see `Budget`.

    Raises:
        Refusal: 413 for a long body, 415 for a compressed one.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "Compressed bodies are not read: send the body as it is.")
    declared = request.headers.get("content-length", "0")
    too_long = Refusal(
        413, f"The body is longer than {limit} bytes: send less.", headers={"Connection": "close"}
    )
    # Most clients only listen once they have sent everything: a body that is a little too long is
    # read to its end, and forgotten, so that they get to know why it is refused.
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > limit + FORGOTTEN:
        raise too_long
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit + FORGOTTEN:
            raise too_long
        if size <= limit:
            take(len(chunk))
            body += chunk
    if size > limit:
        raise too_long
    return body
