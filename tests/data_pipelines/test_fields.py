"""From fields to samples."""

from __future__ import annotations

import json

import pytest

from data_pipelines.fields import FieldNames, guess, to_sample
from data_pipelines.sample import BadRecordError, Caption, Turn

TAR = {
    "jpg": b"\xff\xd8picture",
    "txt": " a café \n".encode(),
    "json": json.dumps({"key": "7", "LANGUAGE": "zh-CN", "alt": {"it": "ciao"}}).encode(),
    "__key__": "00001/000010007",
}


def test_img2dataset(tmp_path):
    names, kind = guess(TAR, {}, "0.tar")
    assert kind == "pairs" and names.caption == ("txt",)
    sample = to_sample(TAR, names, kind, 0)
    assert sample.key == "00001/000010007" and sample.images == (TAR["jpg"],)
    assert sample.captions == (Caption("a café", "zh"),)
    assert 0 <= sample.group < 2**31
    other = to_sample({**TAR, "txt": "a café".encode(), "jpg": b"other"}, names, kind, 1)
    assert other.group == sample.group
    assert to_sample({**TAR, "txt": b"a dog"}, names, kind, 1).group != sample.group


def test_named_fields_and_a_language_for_all():
    names, kind = guess(TAR, {"caption": "json/alt/it", "language": "=it"}, "0.tar")
    assert to_sample(TAR, names, kind, 0).captions == (Caption("ciao", "it"),)
    with pytest.raises(ValueError, match=r"0\.tar has no field 'alt' for the caption.*json/alt"):
        guess(TAR, {"caption": "alt"}, "0.tar")
    with pytest.raises(ValueError, match="has no caption; name its field with --caption"):
        guess({"jpg": b"x"}, {}, "0.tar")
    with pytest.raises(ValueError, match="has no image"):
        guess({"txt": b"x", "bin": b"x"}, {}, "0.tar")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"jpg": None}, "missing image"),
        ({"jpg": b""}, "missing image"),
        ({"jpg": "a path"}, "missing image"),
        ({"txt": None}, "missing caption"),
        ({"txt": b" \n"}, "empty caption"),
        ({"txt": b"\xff\xfe"}, "encoding"),
        ({"txt": "half \ud800"}, "encoding"),
    ],
)
def test_records_that_cannot_be_used(change, reason):
    names, kind = guess(TAR, {}, "0.tar")
    with pytest.raises(BadRecordError) as caught:
        to_sample({**TAR, **change}, names, kind, 0)
    assert caught.value.reason == reason and "00001/000010007" in str(caught.value)


def test_several_captions_and_unknown_languages():
    names = FieldNames(image=("image",), caption=("captions",), language=("lang",))
    fields = {"image": b"x", "captions": ["one", " ", None, b"two"], "lang": "tlh"}
    sample = to_sample(fields, names, "pairs", 3)
    assert sample.captions == (Caption("one"), Caption("two")) and sample.key == "3"


def say(*turns):
    return [{"from": role, "value": value} for role, value in turns]


def talk(images, *turns):
    names = FieldNames(image=("image",), conversations=("conversations",), key=("id",))
    fields = {"id": 9, "image": [b"x"] * images or None, "conversations": json.dumps(say(*turns))}
    return to_sample(fields, names, "conversations", 0)


def test_conversations():
    sample = talk(1, ("human", "<image>\nWhat?"), ("gpt", "A cat."))
    assert sample.turns == (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."))
    assert sample.key == "9" and sample.images == (b"x",) and not sample.captions
    assert talk(0, ("human", "Hi"), ("gpt", "Hello")).images == ()
    # LLaVA's own repairs: a leading answer is dropped, pictures without a place come first.
    sample = talk(2, ("gpt", "Hm."), ("human", "What?"), ("gpt", "A cat."))
    assert sample.turns[0] == Turn("human", "<image>\n<image>\nWhat?") and len(sample.turns) == 2


@pytest.mark.parametrize(
    "images, turns, reason",
    [
        (0, [("human", "<image> What?"), ("gpt", "A cat.")], "image count"),
        (2, [("human", "<image> What?"), ("gpt", "A cat.")], "image count"),
        (0, [("human", "What?")], "conversation"),
        (0, [("human", "What?"), ("human", "What?")], "conversation"),
        (0, [("system", "Be good."), ("human", "What?"), ("gpt", "Yes")], "conversation"),
        (0, [("human", None), ("gpt", "Yes")], "conversation"),
        (0, [(["human"], "What?"), ("gpt", "Yes")], "conversation"),
        (0, [], "conversation"),
    ],
)
def test_conversations_that_cannot_be_used(images, turns, reason):
    with pytest.raises(BadRecordError) as caught:
        talk(images, *turns)
    assert caught.value.reason == reason
