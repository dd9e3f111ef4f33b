"""Chat completions, as OpenAI's clients write and read them.

What this server adds to the request: ``top_k``, ``num_beams``, ``min_new_tokens`` and
``length_penalty``. Without ``temperature`` or ``top_p`` the answer is the most likely one, and
``temperature`` 0 says so. System messages come before the first question, as the chat templates of
the family have a system text of their own.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from .bodies import Body, Search, check_texts
from .limits import Limits, Refusal

PLACEHOLDER = "<image>"
"""Where a picture stands in a turn."""

ONLY: dict[str, Any] = {
    "n": 1, "stop": [], "logprobs": False, "logit_bias": {}, "frequency_penalty": 0,
    "presence_penalty": 0, "tools": [], "modalities": ["text"], "response_format": {"type": "text"},
}  # fmt: skip
"""Fields of which one value changes nothing; any other is refused."""
IGNORED = {"user", "store", "metadata"}


@runtime_checkable
class Reply(Protocol):
    """An answer of the engine."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Part(Body):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _matches(self) -> Part:
        given = {name for name in ("text", "image_url") if getattr(self, name) is not None}
        if given != {self.type}:
            raise ValueError(f"a part of type {self.type} holds {self.type} and nothing else")
        return self


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            return {**value, "content": [{"type": "text", "text": value["content"]}]}
        return value


class StreamOptions(Body):
    include_usage: bool = False


class ChatCompletion(Search):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {name: x for name, x in value.items() if name not in IGNORED and x is not None}
        for name, only in ONLY.items():
            # False == 0: the types count as well.
            if name in kept and kept[name] == only and (kept[name] is True) == (only is True):
                del kept[name]
            elif name in kept:
                raise ValueError(f"{name} can only be {json.dumps(only)} here: leave it out")
        return kept

    @model_validator(mode="after")
    def _tokens(self) -> ChatCompletion:
        most = self.max_completion_tokens or self.max_tokens
        if self.max_new_tokens is None:
            self.max_new_tokens = most
        if self.temperature == 0:
            self.temperature, self.do_sample = None, False
        return self


def turns(body: ChatCompletion, limits: Limits) -> tuple[list[dict[str, str]], list[str]]:
    """The conversation as the engine reads it.

    Args:
        body: a request.
        limits: of its messages, pictures and characters.

    Returns:
        Turns ``{"from": "human" or "gpt", "value": text}`` that alternate and end with a human's,
        and the URLs of the pictures in the order of their placeholders.

    Raises:
        Refusal: 400 or 413.
    """
    if len(body.messages) > limits.texts:
        raise Refusal(
            413, f"messages holds more than {limits.texts}: send fewer.", param="messages"
        )
    system, conversation, urls = "", [], []
    for index, message in enumerate(body.messages):
        where = f"messages[{index}]"
        value = _text(message, where, urls)
        if message.role in ("system", "developer"):
            if conversation:
                raise Refusal(400, f"{where}: system messages come first.", param=where)
            system += value + "\n"
            continue
        if (message.role == "user") != (len(conversation) % 2 == 0):
            raise Refusal(
                400,
                f"{where}: messages of user and assistant alternate, and the user begins.",
                param=where,
            )
        if not conversation:
            value = system + value
        conversation.append({"from": "human" if message.role == "user" else "gpt", "value": value})
    if len(conversation) % 2 == 0:
        raise Refusal(400, "messages: the last one must be the user's.", param="messages")
    check_texts(["".join(turn["value"] for turn in conversation)], limits, "messages")
    if len(urls) > limits.images:
        raise Refusal(413, f"messages hold more than {limits.images} pictures.", param="messages")
    return conversation, urls


def _text(message: Message, where: str, urls: list[str]) -> str:
    pieces = []
    for part in message.content:
        if part.image_url:
            if message.role != "user":
                raise Refusal(400, f"{where}: only the user's messages hold pictures.", param=where)
            urls.append(part.image_url.url)
            pieces.append(PLACEHOLDER)
        elif PLACEHOLDER in (part.text or ""):
            raise Refusal(
                400,
                f"{where}: the text holds {PLACEHOLDER!r}, which stands for a picture here: send "
                "pictures as parts of type image_url.",
                param=where,
            )
        else:
            pieces.append(part.text or "")
    if not any(pieces):
        raise Refusal(400, f"{where}: the message is empty.", param=where)
    return "\n".join(pieces)


def completion(reply: Reply, model: str) -> dict[str, Any]:
    """The answer as one object."""
    message = {"role": "assistant", "content": reply.text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish}
        ],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.new_tokens,
            "total_tokens": reply.prompt_tokens + reply.new_tokens,
        },
    }


def events(whole: dict[str, Any], usage: bool) -> Iterator[str]:
    """The answer as server-sent events: the text in one chunk, why it ended, ``[DONE]``.

    Args:
        whole: see `completion`.
        usage: whether a chunk with the number of tokens comes last.
    """
    chunk = {name: whole[name] for name in ("id", "created", "model")}
    chunk |= {"object": "chat.completion.chunk"} | ({"usage": None} if usage else {})
    choice = whole["choices"][0]
    for delta, finish in ((choice["message"], None), ({}, choice["finish_reason"])):
        part = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        yield _event(chunk | {"choices": [part]})
    if usage:
        yield _event(chunk | {"choices": [], "usage": whole["usage"]})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
