"""The endpoints.

===========================  =======================================================
``POST /embed/image``        a picture as the body, or `bodies.EmbedImage`
``POST /embed/text``         `bodies.EmbedText`
``POST /score``              `bodies.Score`
``POST /caption``            `bodies.Caption`
``POST /chat``               `openai.ChatCompletion`; also ``/v1/chat/completions``
``GET /v1/models``           the model and what it can do
``GET /health``, ``/ready``  200 while the model takes requests, 503 when it does not
``GET /metrics``             Prometheus' text form
===========================  =======================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from . import bodies, openai
from .batching import Batcher, Key, Queue
from .front import Front, on_http_error, on_refusal
from .limits import Budget, Limits, Refusal, read_body
from .metrics import Metrics

VERBS = {
    "embed_image": "embed images",
    "embed_text": "embed texts",
    "score": "score pictures against texts",
    "caption": "caption pictures",
    "chat": "chat",
}
BODIES_AT_ONCE = 8
"""So many bodies of the largest size may be held at the same time."""
PATH = re.compile(r"(?<![\w<.])(?:[A-Za-z]:)?[/\\][^\s'\",;:)]+")

Take = Callable[[int], None]
Value = TypeVar("Value")


@runtime_checkable
class Engine(Protocol):
    """The model behind the server, see ``engine.py``.

    `decode_image`, `settings` and `prompt` may be called from several threads, beside the other
    methods, which are only called from one. For input that is wrong they raise ValueError, one
    sentence for the client. A decoded picture is small: it has the model's size.
    """

    name: str
    abilities: frozenset[str]

    def settings(self, **changes: Any) -> Any: ...
    def prompt(self, language: str = "en") -> str: ...
    def decode_image(self, data: bytes) -> Any: ...
    def embed_image(self, pictures: list, mode: str = "C") -> Any: ...
    def embed_text(self, texts: list[str]) -> Any: ...
    def score(self, pictures: list, texts: list[str], mode: str = "C") -> Any: ...
    def caption(self, pictures: list, prompts: list[str], settings: Any) -> list[str]: ...
    def chat(self, pictures: list, conversations: list, settings: Any) -> list: ...


class Api:
    """The answers.

    Args:
        engine: the model.
        limits: of one request.
        queue: of all of them.
    """

    def __init__(self, engine: Engine, limits: Limits = Limits(), queue: Queue = Queue()):
        self.engine, self.limits = engine, limits
        self.batcher = Batcher(
            self._compute,
            queue,
            lambda key, size, seconds: self.metrics.batch(key[0], size, seconds),
        )
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self._bytes = Budget(BODIES_AT_ONCE * limits.body_bytes, "too many large requests at once")
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        self._started = int(time.time())

    async def embed_image(self, body: bodies.EmbedImage) -> dict[str, Any]:
        """One unit vector per picture."""
        pictures = await self._pictures(body.images)
        rows = await self._run(("embed_image", body.mode), pictures)
        return {"model": self.engine.name, "mode": body.mode, "embeddings": _lists(rows)}

    async def embed_text(self, body: bodies.EmbedText) -> dict[str, Any]:
        """One unit vector per text."""
        rows = await self._run(("embed_text",), body.texts)
        return {"model": self.engine.name, "embeddings": _lists(rows)}

    async def score(self, body: bodies.Score) -> dict[str, Any]:
        """A row per picture, a column per text."""
        pictures = await self._pictures(body.images)
        # A matrix of its own: nothing is shared with other requests.
        rows = await self._run(("score", body.mode, object()), [(pictures, body.texts)])
        return {"model": self.engine.name, "mode": body.mode, "scores": _lists(rows[0])}

    async def caption(self, body: bodies.Caption) -> dict[str, Any]:
        """One caption per picture."""
        settings = body.settings(self.engine.settings, self.limits)
        prompt = body.prompt
        if prompt is None:
            try:
                prompt = self.engine.prompt(body.language or "en")
            except ValueError as error:
                raise Refusal(400, _public(error), param="language") from None
        pictures = await self._pictures(body.images)
        texts = await self._run(("caption", settings), [(picture, prompt) for picture in pictures])
        return {"model": self.engine.name, "captions": texts}

    async def chat(self, body: openai.ChatCompletion) -> dict[str, Any] | Response:
        """The next turn of a conversation, in OpenAI's form."""
        if body.model not in (None, self.engine.name):
            raise Refusal(
                404,
                f"The only model here is {self.engine.name!r}.",
                param="model",
                code="model_not_found",
            )
        settings = body.settings(self.engine.settings, self.limits)
        turns, urls = openai.turns(body, self.limits)
        pictures = await self._pictures(urls, "image_url", bare=False)
        (reply,) = await self._run(("chat", settings), [(pictures, turns)])
        whole = openai.completion(reply, self.engine.name)
        if not body.stream:
            return whole
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            iter(list(openai.events(whole, usage))),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    def models(self) -> dict[str, Any]:
        """The models there are: one."""
        model = {
            "id": self.engine.name,
            "object": "model",
            "created": self._started,
            "owned_by": "internvl_torch",
            "abilities": sorted(self.engine.abilities),
        }
        return {"object": "list", "data": [model]}

    def answering(
        self, ability: str, kind: type[bodies.Body], answer: Callable[..., Coroutine[Any, Any, Any]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """An endpoint: reads and checks the body, then answers in time or not at all."""

        async def endpoint(request: Request) -> Response:
            if ability not in self.engine.abilities:
                can = ", ".join(VERBS.get(name, name) for name in sorted(self.engine.abilities))
                raise Refusal(404, f"This model cannot {VERBS[ability]}; it can {can}.")
            deadline = time.monotonic() + self.limits.seconds
            with self._bytes.share() as take:
                data, picture = await self._body(request, kind, take)

                async def work() -> Any:
                    if picture:
                        body = _picture_body(data, request.query_params.get("mode", "C"))
                    else:
                        body = await self._thread(bodies.parse, kind, data, self.limits)
                    return await answer(body)

                result = await _attended(request, work(), deadline)
            return result if isinstance(result, Response) else JSONResponse(result)

        return endpoint

    async def _body(
        self, request: Request, kind: type[bodies.Body], take: Take
    ) -> tuple[bytearray, bool]:
        """The body, and whether it is a picture."""
        limits = self.limits
        content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        picture = kind is bodies.EmbedImage and content.startswith("image/")
        # A page in a browser cannot send these types to another origin without asking it first.
        if not picture and content != "application/json":
            also = " or image/*" if kind is bodies.EmbedImage else ""
            raise Refusal(415, f"The content type must be application/json{also}.")
        try:
            async with asyncio.timeout(limits.seconds):
                most = limits.image_bytes if picture else limits.body_bytes
                return await read_body(request, most, take), picture
        except TimeoutError:
            raise Refusal(
                408,
                f"The body did not arrive within {limits.seconds:g} seconds.",
                headers={"Connection": "close"},
            ) from None

    async def _pictures(
        self, sources: Sequence[str | bytes], field: str = "images", *, bare: bool = True
    ) -> list:
        """Decoded pictures. There are few threads, so few are at their full size at a time."""

        def decode(source: str | bytes, name: str) -> Any:
            if isinstance(source, str):
                source = bodies.picture_data(source, self.limits, name, bare=bare)
            bodies.check_pixels(source, self.limits, name)
            try:
                return self.engine.decode_image(source)
            except ValueError as error:
                raise Refusal(400, f"{name}: {_public(error)}", param=name) from None

        return [
            await self._thread(decode, source, f"{field}[{index}]")
            for index, source in enumerate(sources)
        ]

    async def _thread(self, function: Callable[..., Value], *args: Any) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def _run(self, key: tuple, items: Sequence) -> list:
        try:
            return await self.batcher.submit(key, items)
        except ValueError as error:
            raise Refusal(400, _public(error)) from error

    def _compute(self, key: Key, items: list) -> list:
        match key:
            case ("embed_image", mode):
                return list(self.engine.embed_image(items, mode))
            case ("embed_text",):
                return list(self.engine.embed_text(items))
            case ("score", mode, _):
                return [self.engine.score(pictures, texts, mode) for pictures, texts in items]
            case ("caption" | "chat" as kind, settings):
                pictures, texts = map(list, zip(*items))
                generate = self.engine.caption if kind == "caption" else self.engine.chat
                return generate(pictures, texts, settings)
        raise ValueError(f"Nothing computes {key}.")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI):
        """Around the server's life: at its end, what waits is computed."""
        yield
        await asyncio.to_thread(self.batcher.close)
        self._threads.shutdown(cancel_futures=True)


def application(api: Api, keys: Sequence[str] = ()) -> FastAPI:
    """The ASGI application.

    Args:
        api: the answers.
        keys: of which every request must bring one; none asks for none.
    """
    web = FastAPI(
        title="InternVL",
        description=f"Serves {api.engine.name}.",
        lifespan=api.lifespan,
        # Their pages load scripts from elsewhere; /openapi.json is enough for tools.
        docs_url=None,
        redoc_url=None,
        exception_handlers={Refusal: on_refusal, HTTPException: on_http_error},
    )
    posts = {
        "/embed/image": ("embed_image", bodies.EmbedImage, api.embed_image),
        "/embed/text": ("embed_text", bodies.EmbedText, api.embed_text),
        "/score": ("score", bodies.Score, api.score),
        "/caption": ("caption", bodies.Caption, api.caption),
        "/chat": ("chat", openai.ChatCompletion, api.chat),
        "/v1/chat/completions": ("chat", openai.ChatCompletion, api.chat),
    }
    for path, (ability, kind, answer) in posts.items():
        web.add_api_route(
            path,
            api.answering(ability, kind, answer),
            methods=["POST"],
            response_model=None,
            name=path.strip("/").replace("/", "_"),
            description=kind.__doc__,
            openapi_extra={"requestBody": _schema(path, kind)},
        )

    def health() -> JSONResponse:
        alive = api.batcher.alive
        content = {"status": "ok" if alive else "down", "model": api.engine.name}
        return JSONResponse(content, 200 if alive else 503)

    def metrics() -> PlainTextResponse:
        return PlainTextResponse(api.metrics.text(), media_type="text/plain; version=0.0.4")

    gets = {"/health": health, "/ready": health, "/metrics": metrics, "/v1/models": api.models}
    for path, answer in gets.items():
        web.add_api_route(path, answer, methods=["GET"], response_model=None)
    routes = [*posts, *gets, "/openapi.json"]
    web.add_middleware(Front, metrics=api.metrics, routes=routes, keys=keys)
    return web


def _schema(path: str, kind: type[bodies.Body]) -> dict[str, Any]:
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    schema = kind.model_json_schema(ref_template=place + "/$defs/{model}")
    return {"required": True, "content": {"application/json": {"schema": schema}}}


async def _attended(request: Request, work: Coroutine[Any, Any, Value], deadline: float) -> Value:
    """The work's result, unless time runs out or the client hangs up: then it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        left = max(0.0, deadline - time.monotonic())
        await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnect
        raise Refusal(504, "The answer took too long: ask for less, or try again.", code="timeout")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _picture_body(data: bytearray, mode: str) -> bodies.EmbedImage:
    if mode not in ("C", "G"):
        raise Refusal(400, "mode must be C or G.", param="mode")
    return bodies.EmbedImage.model_construct(images=[bytes(data)], mode=mode)


def _lists(rows: Any) -> list:
    return [row.tolist() for row in rows]


def _public(error: Exception) -> str:
    """An error's first line without anything that looks like a path."""
    line = (str(error).splitlines() or ["The input does not suit this model."])[0]
    return PATH.sub("…", line)[:300]
