"""Held-out pictures, joined questions, and the command that writes the sets."""

from __future__ import annotations

import json
import pickle

import pytest

from data_pipelines.dialogue import __main__ as command
from data_pipelines.dialogue import held_out
from data_pipelines.dialogue.conversation import converse
from data_pipelines.dialogue.pictures import alternatives, key
from data_pipelines.dialogue.sets import PAPER, SETS, gather


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def test_what_is_held_out(tmp_path):
    refs = [{"image_id": i, "split": s} for i, s in enumerate(("train", "val", "testA", "testB"))]
    books = {"7": {"imageURL": "u", "split": 1}, "8": {"imageURL": "u", "split": 3}}
    split = [{"cocoid": i, "split": s} for i, s in ((10, "train"), (11, "val"), (12, "restval"))]
    files = {
        "refcoco/refs(unc).p": pickle.dumps(refs),
        "coco/dataset_coco.json": {"images": split},
        "coco/coco_karpathy_test.json": [{"image": "val2014/COCO_val2014_000000000021.jpg"}],
        "coco/captions_val2017.json": {
            "images": [{"id": 31, "file_name": "000000000031.jpg"}],
            "annotations": [{"image_id": 31, "id": 1, "caption": "x"}],
        },
        "gqa/testdev_balanced_questions.json": {"1": {"imageId": "n41", "question": "?"}},
        "ocrvqa/dataset.json": books,
        "ai2d/ai2d_test_ids.csv": b"51\n52\n",
        "textcaps/TextCaps_0.1_val.json": {"data": [{"image_id": "ab", "set_name": "val"}]},
        "svit/image_data.json": [
            {"image_id": 61, "coco_id": 1, "url": "u"},
            {"image_id": 62, "coco_id": None},
            {"image_id": 63, "coco_id": 99},
        ],
        "held_out_mine.txt": b"gqa/images/71.jpg\nlrv:72\n",
        "vqav2/irrelevant.json": [],
    }
    for name, data in files.items():
        put(tmp_path / name, data)
    paths = held_out.find(tmp_path)
    assert len(paths) == len(files) - 1
    found = held_out.collect(paths)
    coco = {f"coco:{i}" for i in (1, 2, 3, 11, 21, 31)}
    others = {"ai2d:51", "ai2d:52", "textvqa:ab", "vg:61", "vg:71", "lrv:72"}
    assert found.keys == coco | others | {"gqa:n41", "ocr_vqa:8"}
    assert dict(found.files)[str(tmp_path / "refcoco/refs(unc).p")] == 3
    with pytest.raises(ValueError, match=r"irrelevant.json tells of no held-out picture"):
        held_out.collect([tmp_path / "vqav2/irrelevant.json"])


@pytest.mark.parametrize(
    "path, name",
    [
        ("coco/train2014/COCO_train2014_000000581857.jpg", "coco:581857"),
        ("coco/train2017/000000581857.jpg", "coco:581857"),
        ("stvqa/coco-text/COCO_train2014_000000000009.jpg", "coco:9"),
        ("toloka/images/000000535978.jpg", "coco:535978"),
        ("vg/VG_100K_2/12.jpg", "vg:12"),
        ("gqa/images/12.jpg", "vg:12"),
        ("stvqa/vg/12.jpg", "vg:12"),
        ("lrv/12.jpg", "vg:12"),
        ("llavar/images/000000033471.jpg", "llavar:000000033471"),
        ("ocr_vqa/images/0310337561.jpg", "ocr_vqa:0310337561"),
    ],
)
def test_one_picture_has_one_key(path, name):
    assert key(path) == name
    assert {key(other) for other in alternatives(path)} == {name}


def question(number, image, text, answer, task="vqa"):
    return converse("s", task, number, f"gqa/images/{image}.jpg", [(text, answer)])


def test_questions_on_one_picture_are_joined():
    short = "Answer the question using a single word or phrase."
    given = [
        question(1, 5, f"A?\n{short}", "a"),
        question(2, 6, f"B?\n{short}", "b"),
        question(3, 5, f"C?\n{short}", "c"),
        question(4, 5, f"D?\n{short}", "d"),
        question(5, 5, "Caption.", "e", task="captioning"),
    ]
    joined = [(row.id, [turn.value for turn in row.turns]) for row in gather(iter(given), rounds=2)]
    assert joined == [
        ("5", ["<image>\nCaption.", "e"]),
        ("1", [f"<image>\nA?\n{short}", "a", "C?", "c"]),
        ("4", [f"<image>\nD?\n{short}", "d"]),
        ("2", [f"<image>\nB?\n{short}", "b"]),
    ]


def test_table_3_names_every_set():
    assert {task for entry in SETS.values() for task in entry.tasks} == set(PAPER)
    assert sum(PAPER.values()) == pytest.approx(4e6, rel=0.01)


@pytest.fixture
def root(tmp_path):
    refs = [{"image_id": 3, "split": "val"}]
    put(tmp_path / "raw/refs/refs(unc).p", pickle.dumps(refs))
    row = {"split": "train", "question": "Which?", "choices": ["x", "y"], "correct_choice_idx": 0}
    rows = [{**row, "image_id": i, "question_id": f"q{i}"} for i in range(1, 5)]
    rows[0]["question"] = "Which \ud83d one?"  # half a pair
    put(tmp_path / "raw/aokvqa/aokvqa_v1p0_train.json", rows)
    put(tmp_path / "raw/textcaps/TextCaps_0.1_train.json", {"data": [{"image_id": "a"}]})
    return tmp_path


def run(root, *arguments):
    paths = ["--root", str(root / "raw"), "--out", str(root / "out")]
    return command.main([*arguments, *paths])


def test_a_set_is_written_and_kept(root, capsys):
    put(root / "images/coco/val2014/COCO_val2014_000000000001.jpg", b"")
    put(root / "images/coco/train2017/000000000002.jpg", b"")
    options = ["aokvqa", "--images", str(root / "images")]
    assert run(root, *options) == 0
    out = root / "out/aokvqa"
    lines = [json.loads(line) for line in (out / "conversations.jsonl").read_text().splitlines()]
    # Each under the name it has on this disk; 3 is RefCOCO's, 4 is not there.
    assert [line["image"] for line in lines] == [
        "coco/val2014/COCO_val2014_000000000001.jpg",
        "coco/train2017/000000000002.jpg",
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"] == {"vqa": 2}
    assert report["skipped"] == {"held-out picture": 1, "missing picture": 1}
    table = capsys.readouterr().out
    assert "vqa                             2    1,100,000   1 of 6" in table
    assert "held out: 1 pictures by" in table and "aokvqa q3 shows coco/train2017" in table
    assert sorted(path.name for path in out.iterdir()) == ["conversations.jsonl", "report.json"]

    stamp = (out / "conversations.jsonl").stat().st_mtime_ns
    assert run(root, *options) == 0
    assert "aokvqa: kept, 2 conversations" in capsys.readouterr().out
    assert (out / "conversations.jsonl").stat().st_mtime_ns == stamp
    assert run(root, *options, "--nothing_held_out") == 0  # other settings
    assert "kept" not in capsys.readouterr().out
    put(root / "raw/aokvqa/aokvqa_v1p0_train.json", [])
    assert run(root, *options, "--nothing_held_out") == 0
    assert "aokvqa: 0 conversations" in capsys.readouterr().out


def test_bad_records_and_missing_files_have_their_exit_codes(root, capsys):
    assert run(root) == 65  # both sets of the folder; TextCaps' only record has no caption
    said = capsys.readouterr()
    assert "100% of the records of textcaps are bad, more than 5%" in said.err
    assert "textcaps: 1 left out, missing reference_strs" in said.out
    assert (root / "out/aokvqa/report.json").is_file()
    assert run(root, "--max_bad", "1") == 0
    for arguments, message in (
        (["vqav2"], "vqav2 needs v2_mscoco_train2014_annotations.json"),
        (["vqa"], "The set 'vqa' is unknown"),
        (["aokvqa=elsewhere", "--held_out", "none.p"], "none.p"),
    ):
        assert run(root, *arguments) == 78
        assert message in capsys.readouterr().err
    (root / "raw/refs/refs(unc).p").unlink()
    assert run(root, "aokvqa") == 78
    assert "tells which pictures are held out" in capsys.readouterr().err


def test_an_interrupted_set_is_written_again(root, monkeypatch):
    def broken(notes, exclude=frozenset()):
        yield question(1, 5, "A?", "a")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "read", broken)
        with pytest.raises(KeyboardInterrupt):
            run(root, "aokvqa")
    out = root / "out/aokvqa"
    assert [path.name for path in out.iterdir()] == ["conversations.jsonl.tmp"]
    assert run(root, "aokvqa") == 0
    assert len((out / "conversations.jsonl").read_text().splitlines()) == 3


def test_listing(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(SETS)
