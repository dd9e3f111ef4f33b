"""A server in a thread, with a stand-in for the engine, and a plain client."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from internvl_jax.batch import caption_prompt  # noqa: E402
from internvl_jax.convert.runtime.server.api import Api, application  # noqa: E402
from internvl_jax.convert.runtime.server.batching import Queue  # noqa: E402
from internvl_jax.convert.runtime.server.limits import Limits  # noqa: E402
from internvl_jax.generate.settings import Settings  # noqa: E402

PATIENCE = 20.0


@dataclasses.dataclass
class Reply:
    text: str
    prompt_tokens: int = 7
    new_tokens: int = 3
    finish: str = "stop"


class StandIn:
    """An engine whose answers show what it was asked; `gate` holds it, `calls` records."""

    name = "stand-in"

    def __init__(self, *abilities: str):
        everything = ("embed_image", "embed_text", "score", "caption", "chat")
        self.abilities = frozenset(abilities or everything)
        self.calls: list[tuple[str, int]] = []
        self.seen: list[Any] = []
        self.generation: dict[str, Any] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()

    def _call(self, kind: str, items: list) -> None:
        self.calls.append((kind, len(items)))
        self.busy.set()
        assert self.gate.wait(PATIENCE)
        self.busy.clear()
        if any("poison" in str(item) for item in items):
            raise RuntimeError("the tensor in /secret/model.safetensors is poisoned")
        if any("unsuitable" in str(item) for item in items):
            raise ValueError("The text is unsuitable, says /secret/rules.txt.\nTraceback")

    def settings(self, **changes: Any) -> Settings:
        return Settings(**self.generation | changes)

    def prompt(self, language: str = "en") -> str:
        return caption_prompt(language)

    def decode_image(self, data: bytes) -> tuple[int, int]:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return image.size
        except OSError as error:
            raise ValueError("The picture is truncated.") from error

    def embed_image(self, pictures: list, mode: str = "C") -> np.ndarray:
        self._call("embed_image", pictures)
        return np.array([[*size, mode == "G"] for size in pictures], np.float32)

    def embed_text(self, texts: list[str]) -> np.ndarray:
        self._call("embed_text", texts)
        return np.array([[len(text), 0.5] for text in texts], np.float32)

    def score(self, pictures: list, texts: list[str], mode: str = "C") -> np.ndarray:
        self._call("score", texts)
        return np.array([[width + len(t) for t in texts] for width, _ in pictures], np.float32)

    def caption(self, pictures: list, prompts: list[str], settings: Any) -> list[str]:
        self._call("caption", prompts)
        self.seen.append(settings)
        return [f"{prompt} {width}x{height}" for (width, height), prompt in zip(pictures, prompts)]

    def chat(self, pictures: list, conversations: list, settings: Any) -> list[Reply]:
        self._call("chat", conversations)
        self.seen.append(settings)
        return [Reply(json.dumps([p, c])) for p, c in zip(pictures, conversations)]


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "/secret" not in error["message"] and "Traceback" not in error["message"]
        return error["message"]


class Served:
    def __init__(self, engine: StandIn, server: Any, thread: threading.Thread):
        self.engine, self.server, self.thread = engine, server, thread
        self.port = server.servers[0].sockets[0].getsockname()[1]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers = {"content-type": "application/json", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def raw(self, data: bytes, *, close: bool = False) -> bytes:
        """Sends bytes as they are; what comes back until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as connection:
            connection.sendall(data)
            if close:
                return b""
            received = b""
            while piece := connection.recv(65536):
                received += piece
            return received

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def wait(self, metric: str, value: float) -> None:
        end = time.monotonic() + PATIENCE
        while self.metric(metric) != value:
            assert time.monotonic() < end, f"{metric} is {self.metric(metric)}, not {value}"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(
    *abilities: str,
    limits: Limits = Limits(),
    queue: Queue = Queue(max_wait=0.0),
    keys: tuple[str, ...] = (),
) -> Iterator[Served]:
    engine = StandIn(*abilities)
    app = application(Api(engine, limits, queue), keys)
    config = uvicorn.Config(
        app, port=0, http="h11", ws="none", log_level="critical", timeout_graceful_shutdown=10
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    served = Served(engine, server, thread)
    try:
        yield served
    finally:
        engine.gate.set()
        served.stop()


@pytest.fixture
def serve() -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """A server with settings of its own, see `serving`."""
    return serving


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """A server that all tests of a module ask."""
    with serving() as served:
        yield served
