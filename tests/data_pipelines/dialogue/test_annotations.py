"""Streams of JSON in every wrapping, pickles that may hold only data, boxes, records."""

from __future__ import annotations

import gzip
import json
import os
import pickle

import numpy as np
import pytest

from data_pipelines.dialogue import annotations, pickles
from data_pipelines.dialogue.annotations import Record, records
from data_pipelines.dialogue.boxes import box_text, normalise
from data_pipelines.dialogue.conversation import converse
from data_pipelines.dialogue.prompts import multiple_choice, short_answer
from data_pipelines.sample import BadRecordError
from internvl_jax.batch import TEMPLATES

ROWS = [{"id": i, "text": 'é]}\\" ' * i, "n": [1.5, -2e3, None, True]} for i in range(40)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_wrappings_give_the_same_records(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(annotations, "CHUNK", chunk)
    write = lambda data: json.dumps(data, indent=indent, ensure_ascii=False)
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n"
    texts = {
        "list.json": write(ROWS),
        "bom.json": "\ufeff" + write(ROWS),
        "data.json": write({"info": {"id": 3}, "other": [[1]], "data": ROWS, "licence": 1234567}),
        "keyed.json": write({str(row["id"]): {k: row[k] for k in ("text", "n")} for row in ROWS}),
        "lines.jsonl": lines,
        "lines.json": lines,  # JSON lines under another name
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        key = "id" if name.startswith("keyed") else ""
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            found = [record.data for record in records(path, "data", key=key)]
            assert [{**row, "id": int(row["id"])} for row in found] == ROWS, path.name


def test_a_long_list_is_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK", 1000)
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"data": [{"x": "y" * 90}] * 2000, "rest": []}))
    held = []
    stream_more = annotations._Stream._more

    def more(self, amount):
        result = stream_more(self, amount)
        held.append(len(self.buffer))
        return result

    monkeypatch.setattr(annotations._Stream, "_more", more)
    assert sum(1 for _ in records(path, "data")) == 2000
    assert max(held) < 4000 and len(held) > 100


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1}, {"a"', "ends in the middle; fetch it again"),
        ('[{"a": 1}', "ends in the middle"),
        ('{"data": [{"a": 1}', "ends in the middle"),
        ("", "ends in the middle"),
        ('[{"a": 1} {"a": 2}]', "is no JSON: found '{' instead of ',]'"),
        ('[{"a": x}, {"a": 2}]', "is no JSON: Expecting value"),
        ("<html>", "is no JSON: found '<' instead of '{'"),
        (
            '{"images": [], "version": 2}',
            "entries images, version; expected a list .* 'data'",
        ),
    ],
)
def test_damaged_files_are_sentences(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        list(records(path, "data"))
    assert str(path) in str(error.value)


def test_fields_are_cast_and_missed_with_sentences():
    record = Record(
        {"a": "7", "b": 7.0, "c": "[1, 2]", "d": None, "e": {"x": 1}}, "f.json, record 3"
    )
    assert record.integer("a") == record.integer("z", "b") == 7 and record.text("b") == "7"
    assert record.list("c") == [1, 2] and not record.has("d")
    for call, reason in (
        (lambda: record.text("d"), "missing d"),
        (lambda: record.text("e"), "wrong e"),
        (lambda: record.integer("c"), "wrong c"),
        (lambda: record.list("a"), "wrong a"),
        (lambda: Record([1], "f").text("a"), "no object"),
    ):
        with pytest.raises(BadRecordError) as error:
            call()
        assert error.value.reason == reason
    with pytest.raises(BadRecordError, match=r"f.json, record 3 has 'e' = {'x': 1}, not text."):
        record.text("e")


TEXTS = ("é", b"\xff\x00", None, 1 << 70)
DATA = [{"n": np.int64(-3), "x": np.float32(0.5), "t": TEXTS}]


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_data(tmp_path, protocol):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(DATA, protocol))
    [row] = pickles.load(path)
    assert row == {"n": -3, "x": 0.5, "t": TEXTS}
    assert type(row["n"]) is int and type(row["x"]) is float


def test_pickles_of_python_2(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"(lp0\n(dp1\nS'split'\np2\nS'train'\np3\nsS'ref_id'\np4\nI7\nsa.")
    assert pickles.load(path) == [{"split": "train", "ref_id": 7}]


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "call, arguments, asked",
    [
        (os.system, ("touch {}",), "(posix|nt).system"),
        (eval, ("open({!r}, 'w')",), "(__builtin__|builtins).eval"),
        (getattr, ("x", "upper"), "(__builtin__|builtins).getattr"),
        (np.zeros, (3,), "numpy.*zeros"),
        (pickle.loads, (b"N.",), "_?pickle.loads"),
    ],
)
def test_a_hostile_pickle_is_a_sentence(tmp_path, protocol, call, arguments, asked):
    canary = tmp_path / "canary"
    filled = [a.format(str(canary)) if isinstance(a, str) else a for a in arguments]
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([Hostile(call, *filled)], protocol))
    with pytest.raises(ValueError, match=rf"refs.p is refused: it asks for {asked}, and a file"):
        pickles.load(path)
    assert not canary.exists()


def test_numpy_scalars_are_numbers(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([np.str_("x")]))
    with pytest.raises(ValueError, match=r"refused: it asks for a numpy scalar of type 'U1'"):
        pickles.load(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        pickle.dumps(DATA)[:-3],
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntRp0\n(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb.",  # an object type
        b"cnumpy.core.multiarray\nscalar\n(S'i8'\nS'x'\ntR.",
        b"cnumpy\ndtype\n(dS'__code__'\nS'x'\nsb.",
        b"S'x'\nP1\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ],
)
def test_damaged_pickles_do_no_more_than_fail(tmp_path, data):
    path = tmp_path / "refs.p"
    path.write_bytes(data)
    try:
        value = pickles.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:  # a type alone is harmless, and no expression
        assert not isinstance(value, (np.dtype, np.generic))


@pytest.mark.parametrize(
    "box, size, square, text",
    [
        ((0, 0, 100, 50), (100, 50), True, "[0.0, 0.25, 1.0, 0.75]"),
        ((0, 0, 100, 50), (100, 50), False, "[0.0, 0.0, 1.0, 1.0]"),
        ((10, 20, 30, 60), (50, 101), True, "[0.35, 0.2, 0.54, 0.59]"),  # (101 - 50) // 2 = 25
        ((-5, 10, 120, 30), (100, 100), True, "[0.0, 0.1, 1.0, 0.3]"),
    ],
)
def test_boxes(box, size, square, text):
    assert box_text(normalise(box, *size, square=square)) == text


def test_several_boxes_and_empty_ones():
    one = (0.1, 0.123, 0.5, 1.0)
    assert box_text(one, one) == "[0.1, 0.12, 0.5, 1.0], [0.1, 0.12, 0.5, 1.0]"
    for box, size in (((5, 5, 5, 9), (10, 10)), ((20, 0, 30, 9), (10, 10)), ((0, 0, 1, 1), (0, 9))):
        with pytest.raises(BadRecordError, match="ref 3"):
            normalise(box, *size, place="ref 3")


def test_the_record_is_llavas():
    box = (0.12345, 0.2, 0.3, 0.4)
    made = converse("x", "vqa", 7, ["a/b.jpg", "./c.jpg"], [("Q?", "A"), ("R?", "B")], box=box)
    assert made.to_json() == {
        "id": "7",
        "source": "x",
        "image": ["a/b.jpg", "c.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nQ?"},
            {"from": "gpt", "value": "A"},
            {"from": "human", "value": "R?"},
            {"from": "gpt", "value": "B"},
        ],
        "task": "vqa",
        "box": [0.1235, 0.2, 0.3, 0.4],
    }
    assert set(converse("x", "vqa", 7, [], [("Q?", "A")]).to_json()) == {
        *("id", "source", "conversations", "task")
    }
    for path in ("../a.jpg", "/etc/passwd", "a/../../b", "a\\b", "", "a\0b"):
        with pytest.raises(BadRecordError, match="safe path"):
            converse("x", "vqa", 7, path, [("Q?", "A")])


def test_what_the_model_reads():
    """LLaVA-1.5's prompts in its vicuna_v1 template, as the paper's dialogues have them."""
    rounds = [(short_answer("Who?"), "Ann"), (multiple_choice("Which?", ["x", "y"]), "B")]
    record = converse("s", "ocr", 1, "a.jpg", rounds).to_json()
    first, a, second, b = TEMPLATES["vicuna_v1"].segments(record["conversations"])
    assert first.text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\nWho?"
        "\nAnswer the question using a single word or phrase. ASSISTANT:"
    )
    assert second.text == (
        "USER: Which?\nA. x\nB. y\n"
        "Answer with the option's letter from the given choices directly. ASSISTANT:"
    )
    assert [(s.text, s.learned, s.eos) for s in (a, b)] == [("Ann", True, True), ("B", True, True)]
