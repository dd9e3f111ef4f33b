"""Batches, a full queue, requests that fail, hang or leave, bodies that lie, and the end."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")

from internvl_jax.convert.runtime.server.batching import Queue
from internvl_jax.convert.runtime.server.limits import Limits

PATIENCE = 20.0


class Crowd(ThreadPoolExecutor):
    """Clients of a server whose engine stands still while they line up."""

    def __init__(self, served):
        super().__init__(16)
        self.served = served
        served.engine.gate.clear()
        self.first = self.text("first")
        assert served.engine.busy.wait(PATIENCE)

    def text(self, *texts: str) -> Future:
        return self.submit(self.served.post, "/embed/text", {"texts": texts})

    def __exit__(self, *error):
        self.served.engine.gate.set()
        return super().__exit__(*error)


def queued(served, number: int) -> None:
    served.wait("internvl_queue_length", number)


def test_what_lines_up_is_computed_together(serve) -> None:
    with serve(queue=Queue(max_batch=4, max_wait=0.0)) as served:
        with Crowd(served) as crowd:
            single = [crowd.text("a" * n) for n in (2, 3, 4)]
            double = crowd.text("b" * 5, "c" * 6)
            queued(served, 5)
        assert [c.result().json["embeddings"][0][0] for c in single] == [2, 3, 4]
        assert [row[0] for row in double.result().json["embeddings"]] == [5, 6]
        assert served.engine.calls == [("embed_text", size) for size in (1, 4, 1)]
        assert served.metric('internvl_batch_size_sum{kind="embed_text"}') == 6


def test_a_batch_waits_for_company(serve) -> None:
    # Only a full batch ends the wait.
    with serve(queue=Queue(max_batch=3, max_wait=2 * PATIENCE)) as served:
        with ThreadPoolExecutor() as pool:
            asked = [
                pool.submit(served.post, "/embed/text", {"texts": [text]})
                for text in ("a", "b", "c")
            ]
            assert [future.result().status for future in asked] == [200] * 3
        assert served.engine.calls == [("embed_text", 3)]


def test_kinds_and_settings_do_not_mix(serve) -> None:
    with serve() as served:
        with Crowd(served) as crowd:
            for temperature in (0.5, 0.5, 0.7):
                body = {"messages": [{"role": "user", "content": "a"}], "temperature": temperature}
                crowd.submit(served.post, "/chat", body)
            crowd.text("a")
            queued(served, 4)
        assert sorted(served.engine.calls) == [
            ("chat", 1), ("chat", 2), ("embed_text", 1), ("embed_text", 1)
        ]  # fmt: skip


def test_who_fails_alone_fails_alone(serve) -> None:
    with serve() as served:
        with Crowd(served) as crowd:
            texts = ("good", "poison", "unsuitable", "better")
            asked = [crowd.text(text) for text in texts]
            queued(served, 4)
        good, poison, unsuitable, better = (future.result() for future in asked)
        assert (good.status, better.status) == (200, 200)
        assert poison.status == 500
        assert poison.headers["x-request-id"] in poison.error
        assert unsuitable.status == 400
        assert unsuitable.error == "The text is unsuitable, says …"
        assert [size for _, size in served.engine.calls] == [1, 4, 1, 1, 1, 1]


def test_a_full_queue_refuses(serve) -> None:
    with serve(queue=Queue(max_wait=0.0, max_queue=2)) as served:
        with Crowd(served) as crowd:
            waiting = crowd.text("a", "b")
            queued(served, 2)
            refused = served.post("/embed/text", {"texts": ["c"]})
            assert refused.status == 503 and "queue is full" in refused.error
            assert int(refused.headers["retry-after"]) > 0
            assert served.ask("GET", "/health").status == 200
            never = served.post("/embed/text", {"texts": ["a", "b", "c"]})
            assert never.status == 413 and "never fits" in never.error
        assert waiting.result().status == 200


def test_who_waited_too_long_is_not_computed(serve) -> None:
    with serve(limits=Limits(seconds=1.0)) as served:
        with Crowd(served) as crowd:
            late = crowd.text("late")
            assert crowd.first.result().status == late.result().status == 504
            queued(served, 0)
        assert served.post("/embed/text", {"texts": ["next"]}).status == 200
        assert [size for _, size in served.engine.calls] == [1, 1]


def test_who_left_is_not_computed(serve) -> None:
    body = b'{"texts":["gone"]}'
    with serve() as served:
        with Crowd(served):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(request("/embed/text", body))
                queued(served, 1)
            queued(served, 0)
            served.wait('internvl_requests_total{route="/embed/text",status="499"}', 1)
        served.wait('internvl_requests_total{route="/embed/text",status="200"}', 1)
        assert [size for _, size in served.engine.calls] == [1]


def test_memory_is_bounded_for_all_together(serve) -> None:
    big = "a" * 900
    with serve(limits=Limits(body_bytes=1000)) as served, Crowd(served) as crowd:
        waiting = [crowd.text(big) for _ in range(8)]
        queued(served, 8)
        refused = served.post("/embed/text", {"texts": [big]})
        assert refused.status == 503 and "large requests" in refused.error
        served.engine.gate.set()
        assert [future.result().status for future in waiting] == [200] * 8
        assert served.post("/embed/text", {"texts": [big]}).status == 200


def request(path: str, body: bytes, length: int | None = None, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here"]
    headers = {"content_type": "application/json"} | headers
    if "transfer_encoding" not in headers:
        headers["content_length"] = str(len(body) if length is None else length)
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


@pytest.fixture(scope="module")
def small():
    """Limits of an embedding server with small bodies and little time."""
    return Limits(body_bytes=1000, image_bytes=1000, seconds=1.0)


def test_bodies_that_lie_or_never_end(serve, small) -> None:
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    with serve(limits=small) as served:
        # Refused before it is sent.
        assert statuses(served.raw(request("/embed/text", b"", 10**12))) == [413]
        assert statuses(served.raw(request("/embed/text", b"", 10**30))) == [400]
        # Refused with a sentence, though the client listens only at the end.
        answer = served.post("/embed/text", {"texts": ["a" * 100_000]})
        assert answer.status == 413 and "1000 bytes" in answer.error
        answer = served.post("/embed/image", b"a" * 100_000, content_type="image/png")
        assert answer.status == 413
        body = chunk + b"0\r\n\r\n"
        assert statuses(served.raw(request("/score", body, transfer_encoding="chunked"))) == [413]
        # Without an end: the server hangs up.
        with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as connection:
            connection.sendall(request("/score", b"", transfer_encoding="chunked"))
            with pytest.raises(ConnectionError):
                for _ in range(10_000):
                    connection.sendall(chunk)
        # Shorter than declared: waited for, not for ever. Longer: the rest is no request.
        assert statuses(served.raw(request("/embed/text", b"{", 10))) == [408]
        body = b'{"texts":["a"]}'
        assert statuses(served.raw(request("/embed/text", body + b"}\r\n\r\n", len(body)))) == [
            200,
            400,
        ]
        assert (
            statuses(served.raw(request("/chat", b"zz\r\n", transfer_encoding="chunked")))[0] >= 400
        )
        assert statuses(served.raw(b"\x16\x03\x01 no http\r\n\r\n")) == [400]
        compressed = served.post("/embed/text", b"\x1f\x8b", content_encoding="gzip")
        assert compressed.status == 415
        assert served.ask("GET", "/health").status == 200
        assert [size for _, size in served.engine.calls] == [1]


def test_mangled_bodies_are_never_the_servers_fault(shared) -> None:
    rng = random.Random(0)
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    bodies = {
        "/chat": {"messages": [{"role": "user", "content": parts}], "n": 1, "temperature": 0.5},
        "/caption": {"images": ["data:image/png;base64,AAAA"], "num_beams": 1, "top_p": 0.5},
        "/score": {"images": ["AAAA"], "texts": ["a", "b"], "mode": "C"},
    }
    pieces = [b"{", b"}", b"[", b'"', b",", b"-", b"1e9", b"null", b"\x00", b"\xff", b"\\u0000"]
    for _ in range(150):
        path, body = rng.choice(list(bodies.items()))
        mangled = bytearray(json.dumps(body).encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(mangled))
            mangled[at : at + rng.randint(0, 6)] = rng.choice(pieces)
        answer = shared.post(path, bytes(mangled))
        assert answer.status in (200, 400, 404, 413), (mangled, answer.body)
        assert answer.status == 200 or answer.error


def test_what_was_accepted_is_answered_at_the_end(serve) -> None:
    before = set(threading.enumerate())
    with serve() as served:
        with Crowd(served) as crowd:
            waiting = crowd.text("waiting")
            queued(served, 1)
            end = threading.Thread(target=served.stop)
            end.start()
            served.engine.gate.set()
            assert crowd.first.result().status == waiting.result().status == 200
        end.join(PATIENCE)
        with pytest.raises(ConnectionError):
            served.ask("GET", "/health")
        left = set(threading.enumerate()) - before
        assert not [thread.name for thread in left if thread.name.startswith(("engine", "decode"))]
