"""Every endpoint over loopback: what it answers, and what it says to bad and hostile input."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")

from internvl_jax.generate.settings import Settings

KEY = "a-very-secret-key"


def png(width: int = 4, height: int = 3) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def uri(data: bytes | None = None, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(png() if data is None else data).decode()


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


def test_pictures_are_embedded_from_a_body_and_from_json(shared) -> None:
    whole = shared.post("/embed/image?mode=G", png(), content_type="image/png")
    assert whole.json == {"model": "stand-in", "mode": "G", "embeddings": [[4, 3, 1]]}
    body = {"images": [uri(), base64.b64encode(png(5, 6)).decode()]}
    assert shared.post("/embed/image", body).json["embeddings"] == [[4, 3, 0], [5, 6, 0]]


def test_texts_are_embedded(shared) -> None:
    answer = shared.post("/embed/text", {"texts": ["ab", "日本語", "<image>"]})
    assert answer.json["embeddings"] == [[2, 0.5], [3, 0.5], [7, 0.5]]


def test_pictures_are_scored_against_texts(shared) -> None:
    body = {"images": [uri(), uri(png(9, 1))], "texts": ["a", "bcd"], "mode": "ITM"}
    answer = shared.post("/score", body)
    assert answer.json == {"model": "stand-in", "mode": "ITM", "scores": [[5, 7], [10, 12]]}


def test_captions_follow_a_prompt_or_a_language(shared) -> None:
    assert shared.post("/caption", {"images": [uri()]}).json["captions"] == ["English caption: 4x3"]
    body = {"images": [uri(), uri(png(1, 2))], "language": "de", "num_beams": 3}
    body |= {"max_new_tokens": 9, "length_penalty": 0.5}
    answer = shared.post("/caption", body)
    assert answer.json["captions"] == ["German caption: 4x3", "German caption: 1x2"]
    assert shared.engine.seen[-1] == Settings(num_beams=3, max_new_tokens=9, length_penalty=0.5)
    body = {"images": [uri()], "prompt": "Describe:", "temperature": 0.7}
    assert shared.post("/caption", body).json["captions"] == ["Describe: 4x3"]
    assert shared.engine.seen[-1] == Settings(do_sample=True, temperature=0.7)


def test_what_is_not_asked_for_is_the_models_own_way(shared, monkeypatch) -> None:
    monkeypatch.setattr(shared.engine, "generation", {"num_beams": 5, "max_new_tokens": 77})
    for asked, expected in (
        ({}, Settings(num_beams=5, max_new_tokens=77)),
        ({"num_beams": 2, "top_p": None}, Settings(num_beams=2, max_new_tokens=77)),
        ({"top_k": 3}, Settings(do_sample=True, top_k=3, max_new_tokens=77)),
    ):
        assert shared.post("/caption", {"images": [uri()]} | asked).status == 200
        assert shared.engine.seen[-1] == expected


def test_the_models_own_length_is_cut_to_the_limit(shared, monkeypatch) -> None:
    monkeypatch.setattr(shared.engine, "generation", {"max_new_tokens": 10_000})
    assert shared.post("/caption", {"images": [uri()]}).status == 200
    assert shared.engine.seen[-1] == Settings(max_new_tokens=512)


@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions"])
def test_chat_answers_as_openai_does(shared, path: str) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": uri(), "detail": "high"}},
        {"type": "text", "text": "Compare."},
        {"type": "image_url", "image_url": {"url": uri(png(8, 9))}},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": parts},
    ]
    neutral = {"n": 1, "stop": None, "frequency_penalty": 0, "user": "me", "logprobs": False}
    body = {"model": "stand-in", "messages": messages, "max_tokens": 5, "temperature": 0}
    answer = shared.post(path, body | neutral)
    assert answer.status == 200, answer.body
    whole = answer.json
    choice = whole["choices"][0]
    pictures, turns = json.loads(choice["message"].pop("content"))
    assert pictures == [[4, 3], [8, 9]]
    assert turns == [
        {"from": "human", "value": "Be brief.\nHello"},
        {"from": "gpt", "value": "Hi."},
        {"from": "human", "value": "<image>\nCompare.\n<image>"},
    ]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant"},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert whole["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert whole["object"] == "chat.completion" and whole["model"] == "stand-in"
    assert shared.engine.seen[-1] == Settings(max_new_tokens=5)


def test_chat_streams_events(shared) -> None:
    body = chat("Hello", stream=True, stream_options={"include_usage": True}, top_p=0.5)
    answer = shared.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    first, last, usage = (json.loads(line.removeprefix("data: ")) for line in lines[:-2])
    assert {chunk["object"] for chunk in (first, last, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (first, last, usage)}) == 1
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "Hello" in first["choices"][0]["delta"]["content"]
    assert first["choices"][0]["finish_reason"] is None and first["usage"] is None
    assert last["choices"][0] | {"logprobs": 0} == {
        "index": 0,
        "delta": {},
        "logprobs": 0,
        "finish_reason": "stop",
    }
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 10
    assert shared.engine.seen[-1] == Settings(do_sample=True, top_p=0.5)


def test_the_server_says_what_it_is(shared) -> None:
    assert shared.ask("GET", "/health").json == {"status": "ok", "model": "stand-in"}
    assert shared.ask("GET", "/ready").status == 200
    (model,) = shared.ask("GET", "/v1/models").json["data"]
    assert model["id"] == "stand-in" and "chat" in model["abilities"]
    paths = shared.ask("GET", "/openapi.json").json["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert schema["schema"]["properties"]["messages"]["items"]["$ref"].endswith("$defs/Message")
    assert shared.ask("GET", "/docs").status == 404
    assert "no such endpoint" in shared.ask("GET", "/nothing").error
    assert shared.ask("GET", "/embed/text").status == 405


def test_request_ids_come_back(shared) -> None:
    assert shared.ask("GET", "/health", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    strange = shared.ask("GET", "/health", x_request_id="a b<script>").headers["x-request-id"]
    assert len(strange) == 32 and strange.isalnum()
    assert shared.ask("GET", "/nothing").headers["x-request-id"]


def test_pages_in_a_browser_need_a_key(shared, serve) -> None:
    page = {"origin": "http://example.org"}
    answer = shared.ask("OPTIONS", "/chat", **page, access_control_request_method="POST")
    assert not any(name.lower().startswith("access-control") for name in answer.headers)
    answer = shared.post("/embed/text", {"texts": ["a"]}, **page)
    assert answer.status == 403 and "key" in answer.error
    answer = shared.post("/embed/text", {"texts": ["a"]}, content_type="text/plain")
    assert answer.status == 415 and "application/json" in answer.error
    with serve(keys=(KEY,)) as served:
        page["authorization"] = f"Bearer {KEY}"
        assert served.post("/embed/text", {"texts": ["a"]}, **page).status == 200


HOSTILE = {
    "nothing": ("/embed/text", b"", 400),
    "half": ("/embed/text", b'{"texts": ["a', 400),
    "no object": ("/embed/text", b"[1]", 400),
    "not utf-8": ("/embed/text", b'{"texts": ["\xff"]}', 400),
    "half a surrogate": ("/embed/text", b'{"texts": ["\\ud800"]}', 400),
    "deep": ("/embed/text", b'{"texts":' + b"[" * 50_000, 400),
    "deep and known": ("/chat", b'{"messages":' + b'[{"content":' * 5_000, 400),
    "many elements": ("/embed/text", b'{"texts":[' + b"0," * 200_000 + b"0]}", 413),
    "unknown field": ("/embed/text", {"texts": ["a"], "path": "/etc/passwd"}, 400),
    "missing field": ("/embed/text", {}, 400),
    "no texts": ("/embed/text", {"texts": []}, 400),
    "a text alone": ("/embed/text", {"texts": "a"}, 400),
    "a number": ("/embed/text", {"texts": [1]}, 400),
    "many texts": ("/embed/text", {"texts": ["a"] * 129}, 413),
    "a long text": ("/embed/text", {"texts": ["a" * 20_001]}, 413),
    "mode": ("/embed/image", {"images": [uri()], "mode": "X"}, 400),
    "mode in the query": ("/embed/image?mode=X", png(), 400),
    "many pictures": ("/embed/image", {"images": [uri()] * 17}, 413),
    "http": ("/embed/image", {"images": ["http://127.0.0.1/a.png"]}, 400),
    "file": ("/embed/image", {"images": ["file:///etc/passwd"]}, 400),
    "path": ("/embed/image", {"images": ["/etc/passwd"]}, 400),
    "path upwards": ("/embed/image", {"images": ["../../etc/passwd"]}, 400),
    "path as base64": ("/embed/image", {"images": ["etc/passwd=="]}, 400),
    "bad base64": ("/embed/image", {"images": ["data:image/png;base64,!!!!"]}, 400),
    "empty picture": ("/embed/image", {"images": ["data:image/png;base64,"]}, 400),
    "html": ("/embed/image", {"images": [uri(b"<html>", "text/html")]}, 400),
    "html called png": ("/embed/image", {"images": [uri(b"<html>")]}, 400),
    "svg": ("/embed/image", {"images": [uri(b"<svg xmlns='x'/>", "image/svg+xml")]}, 400),
    "truncated picture": ("/embed/image", {"images": [uri(png(300, 300)[:-40])]}, 400),
    "prompt and language": ("/caption", {"images": [uri()], "prompt": "a", "language": "en"}, 400),
    "language": ("/caption", {"images": [uri()], "language": "xx"}, 400),
    "negative": ("/caption", {"images": [uri()], "max_new_tokens": -1}, 400),
    "too many tokens": ("/caption", {"images": [uri()], "max_new_tokens": 513}, 400),
    "too many beams": ("/caption", {"images": [uri()], "num_beams": 9}, 400),
    "huge": ("/caption", b'{"images":["a"],"num_beams":' + b"9" * 9_000 + b"}", 400),
    "huge power": ("/caption", b'{"images":["a"],"length_penalty":1e999}', 400),
    "large power": ("/caption", {"images": [uri()], "length_penalty": -1e30}, 400),
    "nan": ("/caption", b'{"images":["a"],"length_penalty":NaN}', 400),
    "bool for a number": ("/caption", {"images": [uri()], "num_beams": True}, 400),
    "number as text": ("/caption", {"images": [uri()], "num_beams": "2"}, 400),
    "beams that sample": ("/caption", {"images": [uri()], "num_beams": 2, "do_sample": True}, 400),
    "no messages": ("/chat", {"messages": []}, 400),
    "role": ("/chat", {"messages": [{"role": "tool", "content": "a"}]}, 400),
    "assistant last": (
        "/chat",
        {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]},
        400,
    ),
    "two users": ("/chat", {"messages": [{"role": "user", "content": "a"}] * 2}, 400),
    "late system": (
        "/chat",
        {"messages": [{"role": r, "content": "a"} for r in ("user", "system", "user")]},
        400,
    ),
    "empty content": ("/chat", chat(""), 400),
    "no content": ("/chat", chat(None), 400),
    "part": ("/chat", chat([{"type": "video", "text": "a"}]), 400),
    "part of two": ("/chat", chat([{"type": "text", "image_url": {"url": uri()}}]), 400),
    "chat by url": (
        "/chat",
        chat([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]),
        400,
    ),
    "chat with bare base64": (
        "/chat",
        chat([{"type": "image_url", "image_url": {"url": base64.b64encode(png()).decode()}}]),
        400,
    ),
    "picture of the assistant": (
        "/chat",
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "image_url", "image_url": {"url": uri()}}],
                }
            ]
        },
        400,
    ),
    "placeholder": ("/chat", chat("look: <image>"), 400),
    "two answers": ("/chat", chat("a", n=2), 400),
    "n as a bool": ("/chat", chat("a", n=True), 400),
    "stop": ("/chat", chat("a", stop=["x"]), 400),
    "tools": ("/chat", chat("a", tools=[{"type": "function"}]), 400),
    "seed": ("/chat", chat("a", seed=1), 400),
    "hot": ("/chat", chat("a", temperature=3), 400),
    "other model": ("/chat", chat("a", model="gpt-4"), 404),
    "long conversation": ("/chat", chat("a" * 20_001), 413),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_has_a_sentence(shared, name: str) -> None:
    path, body, status = HOSTILE[name]
    before = len(shared.engine.calls)
    kind = "image/png" if isinstance(body, bytes) and body == png() else "application/json"
    answer = shared.post(path, body, content_type=kind)
    assert answer.status == status, answer.body
    message = answer.error
    assert message.endswith(".") and len(message) < 500 and "\n" not in message
    assert len(shared.engine.calls) == before, "the engine was asked"
    assert shared.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    "name, word",
    [
        ("http", "not fetched"),
        ("chat by url", "not fetched"),
        ("unknown field", "path is not supported"),
        ("missing field", "texts: Field required"),
        ("tools", "tools can only be []"),
        ("seed", "seed is not supported"),
        ("role", "messages[0].role"),
        ("part", "messages[0].content[0].type"),
        ("language", "xx"),
        ("truncated picture", "images[0]: The picture is truncated"),
        ("html", "no picture"),
        ("too many tokens", "at most 512"),
    ],
)
def test_the_sentence_names_what_is_wrong(shared, name: str, word: str) -> None:
    path, body, _ = HOSTILE[name]
    assert word in shared.post(path, body).error


def bomb(width: int, height: int) -> bytes:
    """A PNG that declares far more pixels than it has bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [6_500, 10_000, 100_000])
def test_bombs_are_not_decoded(shared, side: int) -> None:
    for body, kind in (
        (bomb(side, side), "image/png"),
        ({"images": [uri(bomb(side, side))]}, "application/json"),
    ):
        answer = shared.post("/embed/image", body, content_type=kind)
        assert answer.status == 413 and "40000000 pixels" in answer.error


def test_a_model_says_what_it_cannot_do(serve) -> None:
    with serve("embed_image", "embed_text") as served:
        answer = served.post("/chat", chat("a"))
        assert answer.status == 404
        assert answer.error == "This model cannot chat; it can embed images, embed texts."


def test_keys_are_asked_for(serve) -> None:
    with serve(keys=("other", KEY)) as served:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
            answer = served.ask("GET", "/v1/models", **header)
            assert answer.status == 401 and KEY not in answer.body.decode()
            assert answer.headers["www-authenticate"] == "Bearer"
        assert served.ask("GET", "/metrics").status == 401
        assert served.ask("GET", "/health").status == 200
        assert served.ask("GET", "/v1/models", authorization=f"Bearer {KEY}").status == 200


def test_metrics_count_requests_and_batches(shared) -> None:
    name = 'internvl_requests_total{route="/embed/text",status="200"}'
    before = shared.metric(name)
    shared.post("/embed/text", {"texts": ["a"]})
    shared.ask("GET", "/somewhere/else")
    assert shared.metric(name) == before + 1
    text = shared.ask("GET", "/metrics").body.decode()
    assert 'internvl_requests_total{route="other",status="404"}' in text
    assert "somewhere" not in text
    assert 'internvl_batch_size_bucket{kind="embed_text",le="+Inf"}' in text
    assert "\ninternvl_queue_length 0\n" in text
    for line in text.splitlines():
        assert line.startswith("# ") or float(line.rsplit(" ", 1)[1]) >= 0
