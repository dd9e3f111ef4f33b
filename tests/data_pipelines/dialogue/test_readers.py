"""Every stage-3 set on tiny files with its true layout, and as mirrors change it."""

from __future__ import annotations

import gzip
import json
import pathlib
import pickle

import numpy as np
import pytest

from data_pipelines.dialogue.annotations import Annotations
from data_pipelines.dialogue.sets import SETS, read

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CAPTION = "<image>\nProvide a one-sentence caption for the provided image."
DESCRIBE = "<image>\nPlease provide a short description for this region: [{}]."
LOCATE = (
    "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: {}"
)


def put(folder: pathlib.Path, name: str, data) -> pathlib.Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def found(name: str, folder: pathlib.Path, exclude=frozenset(), **options):
    """What a set gives: (image, task, [question, answer, …]) by conversation, and what it skips."""
    notes = Annotations(name, folder, **options)
    rows = [conversation.to_json() for conversation in read(notes, frozenset(exclude))]
    assert all(row["source"] == name and row["task"] in SETS[name].tasks for row in rows)
    turns = [[turn["value"] for turn in row["conversations"]] for row in rows]
    return [(row.get("image"), *values) for row, values in zip(rows, turns)], dict(notes.skipped)


def test_coco_caption_in_its_three_layouts(tmp_path):
    image = "coco/{0}/COCO_{0}_{1:012d}.jpg"
    karpathy = [
        {"caption": "A cat.", "image": "train2014/COCO_train2014_000000000009.jpg", "image_id": 9},
        {"caption": "A dog.", "image": "val2014/COCO_val2014_000000000042.jpg", "image_id": "42"},
        {"caption": " ", "image": "val2014/COCO_val2014_000000000042.jpg", "image_id": "42"},
    ]
    put(tmp_path / "a", "coco_karpathy_train.json", karpathy)
    expected = [
        (image.format("train2014", 9), CAPTION, "A cat."),
        (image.format("val2014", 42), CAPTION, "A dog."),
    ]
    assert found("coco_caption", tmp_path / "a") == (expected, {"empty answer": 1})
    split = {"images": [], "dataset": "coco"}
    for number, part, text in ((9, "train", "A cat."), (42, "restval", "A dog."), (7, "val", "")):
        path = "train2014" if part == "train" else "val2014"
        sentences = [{"raw": text, "tokens": [], "imgid": 0, "sentid": number}]
        name = f"COCO_{path}_{number:012d}.jpg"
        row = {"filepath": path, "filename": name, "cocoid": number, "split": part}
        split["images"].append({**row, "sentences": sentences})
    put(tmp_path / "b", "dataset_coco.json", split)
    assert found("coco_caption", tmp_path / "b") == (expected, {"held-out split": 1})
    plain = {
        "info": {"year": 2014},
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 1}],
        "annotations": [{"image_id": "9", "id": 5, "caption": "A cat.\n"}],
    }
    packed = gzip.compress(json.dumps(plain).encode())
    put(tmp_path / "c", "captions_train2014.json.gz", packed)
    assert found("coco_caption", tmp_path / "c") == (expected[:1], {})


def test_textcaps_takes_one_caption_a_picture(tmp_path):
    row = {"image_id": "0a1b", "set_name": "train", "caption_str": "A sign.", "caption_id": 1}
    other = {"image_id": "2c3d", "set_name": "val", "caption_str": "A book."}
    data = [row, {**row, "caption_str": "Two."}, other, {"image_id": "x", "image_width": 3}]
    put(tmp_path, "TextCaps_0.1_train.json", {"dataset_name": "textcaps", "data": data})
    rows, skipped = found("textcaps", tmp_path)
    assert rows == [("textvqa/train_images/0a1b.jpg", CAPTION, "A sign.")]
    assert skipped == {"held-out split": 1, "missing reference_strs": 1}


QUESTIONS = {"questions": [{"image_id": 9, "question": "What is it?", "question_id": 9000}]}
ANSWERS = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate("bcca")]


def test_vqav2_joins_questions_and_consensus(tmp_path):
    annotation = {
        "question_id": "9000",
        "image_id": "9",
        "answers": ANSWERS,
        "answer_type": "other",
    }
    both = [{**annotation, "multiple_choice_answer": "b"}, {**annotation, "question_id": 1}]
    put(tmp_path, "v2_OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    put(tmp_path, "v2_mscoco_train2014_annotations.json", {"annotations": both})
    row = ("coco/train2014/COCO_train2014_000000000009.jpg", f"<image>\nWhat is it?{SHORT}")
    assert found("vqav2", tmp_path) == ([(*row, "b")], {"missing question": 1})


def test_okvqa_takes_the_most_frequent_answer_also_where_joined(tmp_path):
    row = ("coco/train2014/COCO_train2014_000000000009.jpg", f"<image>\nWhat is it?{SHORT}")
    put(tmp_path / "a", "OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    own = {"question_id": 9000, "image_id": 9, "answers": ANSWERS, "confidence": 3}
    put(tmp_path / "a", "mscoco_train2014_annotations.json", {"annotations": [own]})
    assert found("okvqa", tmp_path / "a") == ([(*row, "c")], {})
    joined = {**QUESTIONS["questions"][0], "answers": ["b", "c", "a", "c"]}
    written = {**joined, "answers": json.dumps(joined["answers"])}  # a list as text
    lines = f"{json.dumps(joined)}\n{json.dumps(written)}\n{{broken\n"
    put(tmp_path / "b", "okvqa_train.jsonl", lines)
    assert found("okvqa", tmp_path / "b") == ([(*row, "c")] * 2, {"no object": 1})


def test_aokvqa_asks_for_the_letter(tmp_path):
    row = {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man doing?",
        "choices": ["ski", "carry", "rest"],
        "correct_choice_idx": 1,
        "direct_answers": ["ski"],
    }
    bad = [{**row, "split": "val"}, {**row, "correct_choice_idx": 3}]
    put(tmp_path, "aokvqa_v1p0_train.json", [row, *bad])
    text = f"<image>\nWhat is the man doing?\nA. ski\nB. carry\nC. rest{LETTER}"
    rows, skipped = found("aokvqa", tmp_path)
    assert rows == [("coco/train2017/000000299207.jpg", text, "B")]
    assert skipped == {"held-out split": 1, "wrong option": 1}


def test_iconqa_text_blanks_and_pictures(tmp_path):
    base = {"question": "How many?", "ques_type": "x", "grade": "prek", "label": "s"}
    path = "iconqa/train/{}/data.json"
    text = {**base, "choices": ["2", "3"], "answer": 1}
    put(tmp_path, path.format("choose_txt/11"), text)
    put(tmp_path, path.format("fill_in_blank/12"), {**base, "answer": 7})
    drawn = {**base, "choices": ["choice_0.png", "choice_1.png"], "answer": 0}
    put(tmp_path, path.format("choose_img/13"), drawn)
    rows, _ = found("iconqa", tmp_path)
    assert rows == [
        ("iconqa/train/choose_txt/11/image.png", f"<image>\nHow many?\nA. 2\nB. 3{LETTER}", "B"),
        ("iconqa/train/fill_in_blank/12/image.png", f"<image>\nHow many?{SHORT}", "7"),
    ]
    [(images, question, answer)], _ = found("iconqa_pictures", tmp_path)
    assert [pathlib.Path(p).name for p in images] == ["image.png", "choice_0.png", "choice_1.png"]
    assert question.startswith("<image>\n" * 3 + "How many?\n") and "A, B" in question
    assert answer == "A"


def test_ai2d_leaves_its_test_pictures_out(tmp_path):
    def diagram(name, **extra):
        entry = {"questionId": f"{name}-0", "answerTexts": ["a", "b", "c", "d"], **extra}
        return {"imageName": name, "questions": {"Which?": {"correctAnswer": 2, **entry}}}

    put(tmp_path, "ai2d_test_ids.csv", "1\n77\n")
    put(tmp_path, "ai2d/questions/0.png.json", diagram("0.png", abcLabel=False))
    put(tmp_path, "ai2d/questions/1.png.json", diagram("1.png", abcLabel=False))
    put(tmp_path, "ai2d/questions/2.png.json", diagram("2.png", abcLabel=True))
    put(tmp_path, "ai2d/questions/3.png.json", "{")
    rows, skipped = found("ai2d", tmp_path)
    text = f"<image>\nWhich?\nA. a\nB. b\nC. c\nD. d{LETTER}"
    assert rows == [("ai2d/images/0.png", text, "C"), ("ai2d/abc_images/2.png", text, "C")]
    assert skipped == {"held-out split": 1, "no object": 1}


@pytest.mark.parametrize("name", ["train_balanced_questions.json", "train_all_questions/1.json"])
def test_gqa_reads_objects_and_lists(tmp_path, name):
    row = {"question": "Is it red?", "answer": "yes", "imageId": "2354786", "isBalanced": True}
    other = {**row, "isBalanced": False}
    expected = [("gqa/images/2354786.jpg", f"<image>\nIs it red?{SHORT}", "yes")]
    put(tmp_path / "a", name, {"07": row, "08": other})
    assert found("gqa", tmp_path / "a") == (expected, {"not balanced": 1})
    put(tmp_path / "b", name, [{**row, "question_id": 7, "imageId": 2354786}])
    assert found("gqa", tmp_path / "b") == (expected, {})


def test_ocrvqa_keeps_split_one(tmp_path):
    book = {
        "imageURL": "http://ecx.images-amazon.com/images/I/51l6XIoa3rL.jpg",
        "questions": ["Who wrote this book?", "Is this a novel?"],
        "answers": ["Ann", "No"],
        "title": "T",
        "split": 1,
    }
    short = {**book, "answers": ["Ann"]}
    data = {"0310337561": book, "2": {**book, "split": 2}, "3": {**book, "split": "3"}, "4": short}
    put(tmp_path, "dataset.json", data)
    rows, skipped = found("ocrvqa", tmp_path)
    first = f"<image>\nWho wrote this book?{SHORT}"
    image = "ocr_vqa/images/0310337561.jpg"
    assert rows == [(image, first, "Ann", "Is this a novel?", "No")]
    assert skipped == {"held-out split": 2, "wrong answers": 1}


def test_chartqa_has_two_files(tmp_path):
    for kind in ("human", "augmented"):
        row = {"imgname": "41.png", "query": f"{kind}?", "label": "[3, 4]"}
        put(tmp_path, f"train/train_{kind}.json", [row])
    rows, _ = found("chartqa", tmp_path)
    image = "chartqa/train/png/41.png"
    assert rows == [
        (image, f"<image>\n{kind}?{SHORT}", "[3, 4]") for kind in ("augmented", "human")
    ]


DOCUMENTS = [
    ("docvqa", "train_v1.0_withQT.json", "image", "documents/x_1.png", "docvqa/documents/x_1.png"),
    (
        "infovqa",
        "infographicsVQA_train_v1.0.json",
        "image_local_name",
        "10.jpeg",
        "infovqa/images/10.jpeg",
    ),
    ("stvqa", "train_task_3.json", "file_path", "coco-text/COCO_train2014_000000000009.jpg", ""),
]


@pytest.mark.parametrize("name, file, field, value, image", DOCUMENTS)
def test_documents(tmp_path, name, file, field, value, image):
    number = "question_id" if name == "stvqa" else "questionId"
    row = {
        number: 337,
        "question": "Which year?",
        field: value,
        "answers": ["", "1998", "98", "98", "", ""],
    }
    rows = [row, {**row, "data_split": "val"}, {**row, "answers": []}]
    put(tmp_path, file, {"dataset_version": "1.0", "data": rows})
    result, skipped = found(name, tmp_path)
    path = image or f"stvqa/{value}"
    assert result == [(path, f"<image>\nWhich year?{SHORT}", "98")]
    assert skipped == {"held-out split": 1, "no answer": 1}
    if name == "stvqa":  # a picture of COCO under another name
        assert found(name, tmp_path, {"coco:9"})[1]["held-out picture"] == 1


def test_estvqa_in_two_languages(tmp_path):
    corners = ["53", "680", "50", "727", "415", "711", "414", "661"]
    one = {"question": "这家店的名字是什么?", "answer": "全家", "evidence": corners}
    two = {"question": "What is the name?", "answer": "SMARA", "evidence": corners}
    data = [
        {"id": 0, "image": "0.jpg", "annotation": [one]},
        {"image": "1.jpg", "annotation": [two]},
    ]
    put(tmp_path, "estvqa_train.json", data)
    assert found("estvqa", tmp_path)[0] == [
        ("estvqa/images/0.jpg", "<image>\n这家店的名字是什么?\n请用一个词或短语回答问题。", "全家"),
        ("estvqa/images/1.jpg", f"<image>\nWhat is the name?{SHORT}", "SMARA"),
    ]


INSTANCES = {
    "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640}],
    "annotations": [{"id": 3, "image_id": 581857, "bbox": [64.0, 120, 128, 60], "iscrowd": 0}],
    "categories": [{"id": 1, "name": "person"}],
}
INSTANCES["images"][0]["height"] = 320
INSTANCES["annotations"] += [{"id": 4, "bbox": "x"}, {"id": 5, "bbox": [1, 2, 3]}, {"id": 6}]


def reference(split="train", number=0, image=581857):
    sentences = [
        {"sent_id": 5, "raw": "The LADY in blue", "sent": "the lady in blue", "tokens": []}
    ]
    return {
        "ref_id": np.int64(number),
        "ann_id": 3,
        "image_id": image,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image:012d}_3.jpg",
        "split": split,
        "sent_ids": [5],
        "sentences": sentences,
    }


@pytest.mark.parametrize(
    "name, file",
    [("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_refcoco_asks_both_ways_in_the_padded_frame(tmp_path, name, file, protocol):
    refs = [reference(), reference("testA", 1), reference(number=2, image=7)]
    put(tmp_path, file, pickle.dumps(refs, protocol))
    put(tmp_path, "instances.json", INSTANCES)
    rows, skipped = found(name, tmp_path)
    image = "coco/train2014/COCO_train2014_000000581857.jpg"
    # 640 x 320: 160 pixels are put above and below, the unit is 640.
    box = "0.1, 0.44, 0.3, 0.53"
    assert rows == [
        (image, LOCATE.format("The lady in blue."), f"[{box}]"),
        (image, DESCRIBE.format(box), "The lady in blue."),
    ]
    assert skipped == {
        "held-out split": 1,
        "missing picture": 1,
        "wrong bbox": 2,
        "missing width": 1,
    }
    assert found(name, tmp_path, {"coco:581857"})[0] == []
    plain, _ = found(name, tmp_path, square=False)
    assert plain[0][-1] == "[0.1, 0.38, 0.3, 0.56]"


def test_refcocog_prefers_umd_and_json_mirrors_work(tmp_path):
    put(tmp_path, "instances.json", INSTANCES)
    put(tmp_path, "refs(google).p", pickle.dumps([]))
    put(tmp_path, "refs(umd).p", pickle.dumps([reference()]))
    assert len(found("refcocog", tmp_path)[0]) == 2
    for path in tmp_path.glob("*.p"):
        path.unlink()
    mirror = {**reference(), "ref_id": "1", "sentences": ["lady"], "image_id": "581857"}
    put(tmp_path, "refs.json", [mirror])
    assert found("refcocog", tmp_path)[0][1][-1] == "Lady."


def test_toloka_answers_with_a_box(tmp_path):
    table = (
        "image,width,height,left,top,right,bottom,question\n"
        'https://x.net/wsdm/000000535978.jpg,640,427,64,106,320,500,"What, do you hit with?"\n'
        "https://x.net/wsdm/000000000001.jpg,640,427,,1,2,3,Where?\n"
        "https://x.net/wsdm/000000000002.jpg,640,427,9,1,9,3,Where?\n"
    )
    put(tmp_path, "train.csv", table)
    rows, skipped = found("toloka", tmp_path)
    [(image, question, answer)] = rows
    assert image == "toloka/images/000000535978.jpg"
    assert question.startswith("<image>\nWhat, do you hit with?\nPlease provide the bounding box")
    assert answer == "[0.1, 0.33, 0.5, 0.83]"  # cut at the lower edge: (427 + 106) / 640
    assert skipped == {"missing left": 1, "empty box": 1}
    assert found("toloka", tmp_path, {"coco:535978"})[0] == []


def llava(question="What?", answer="A cup.", **extra):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "000000033471", "conversations": turns, **extra}


def test_llava_150k_and_mix665k(tmp_path):
    own = llava("<image>\nWhat?", image="000000033471.jpg")
    put(tmp_path / "a", "llava_instruct_150k.json", [own])
    image = "coco/train2017/000000033471.jpg"
    assert found("llava_150k", tmp_path / "a")[0] == [(image, "<image>\nWhat?", "A cup.")]
    opening = {"from": "gpt", "value": "Hello"}
    shared = {"id": "x1", "conversations": [opening, *llava()["conversations"], {"from": "human"}]}
    shared["conversations"][-1]["value"] = "And?"
    rows = [
        llava("What?\n<image>", image="gqa/images/2.jpg"),
        shared,
        llava("<image>\nWhat?"),
        llava(image="../secret.jpg"),
        {"id": 1, "conversations": [llava()["conversations"][0]] * 2},
        llava("<image>", image="vg/VG_100K/3.jpg"),
    ]
    put(tmp_path / "b", "llava_v1_5_mix665k.json", rows)
    result, skipped = found("mix665k", tmp_path / "b", {"vg:9"})
    assert result == [("gqa/images/2.jpg", "What?\n<image>", "A cup."), (None, "What?", "A cup.")]
    assert skipped == {"pictures": 1, "unsafe path": 1, "turns": 1, "empty turn": 1}
    assert found("mix665k", tmp_path / "b", {"vg:2"})[1]["held-out picture"] == 1


def test_llavar_without_the_records_of_llava(tmp_path):
    old, new = llava("<image>\nOld?", image="000000033471.jpg"), llava("New?", image="0001.jpg")
    put(tmp_path, "llava_instruct_150k_llavar_20k.json", [old, new])
    with pytest.raises(FileNotFoundError, match=r"llavar needs llava_instruct_150k.json"):
        found("llavar", tmp_path)
    put(tmp_path, "llava_instruct_150k.json", [llava("Old?\n<image>", image="x.jpg")])
    # Its file names only look like COCO's.
    assert found("llavar", tmp_path, {"coco:1"})[0] == [
        ("llavar/images/0001.jpg", "<image>\nNew?", "A cup.")
    ]


def test_lrv_with_charts(tmp_path):
    row = {"image_id": 2379996, "question": "Is there a <image> sign?", "answer": "No."}
    put(tmp_path, "filter_cap1.json", [row])
    put(tmp_path, "filter_cap_more1.json", [{**row, "answer": None}])
    put(tmp_path, "chart_release_update.json", [{**row, "image_id": "chart/7.png"}])
    rows, skipped = found("lrv", tmp_path)
    assert [row[0] for row in rows] == ["lrv/2379996.jpg", "lrv/chart/7.png"]
    assert rows[0][1] == "<image>\nIs there a   sign?" and skipped == {"missing answer": 1}
    assert len(found("lrv", tmp_path, {"vg:2379996"})[0]) == 1


def test_svit_moves_its_boxes_into_our_frame(tmp_path):
    def talk(question, answer):
        return {"content": [{"from": "user", "value": question}, {"from": "gpt", "value": answer}]}

    marked = talk("Where is the <st>cup<ed> [0.0, 0.5, 0.5, 1.0]?", "Left.")
    data = [{"image_id": 2354786, "conversations": [talk("What?", "A cup."), marked]}]
    put(tmp_path, "svit.json", data)
    image = "vg/VG_100K/2354786.jpg"
    plain = (image, "<image>\nWhat?", "A cup.")
    assert found("svit", tmp_path) == ([plain], {"picture size": 1})
    put(tmp_path, "image_data.json", [{"image_id": 2354786, "width": 800, "height": 400}])
    rows, _ = found("svit", tmp_path)
    assert rows == [plain, (image, "<image>\nWhere is the cup [0.0, 0.5, 0.5, 0.75]?", "Left.")]


def test_visdial_looks_up_the_shared_lists(tmp_path):
    turn = {"question": 1, "answer": "0", "answer_options": [0, 1], "gt_index": 0}
    wrong = {**turn, "answer": 2}
    data = {
        "dialogs": [
            {"image_id": 378466, "caption": "a man", "dialog": [turn, {**turn, "question": 0}]},
            {"image_id": 2, "caption": "a man", "dialog": [wrong]},
        ],
        "questions": ["is it sunny", "how many people"],
        "answers": ["2", "no"],
    }
    put(tmp_path, "visdial_1.0_train.json", {"version": "1.0", "split": "train", "data": data})
    rows, skipped = found("visdial", tmp_path)
    image = "coco/train2014/COCO_train2014_000000378466.jpg"
    assert rows == [(image, "<image>\nhow many people?", "2", "is it sunny?", "2")]
    assert skipped == {"wrong answer": 1}


def test_a_missing_field_is_a_sentence(tmp_path):
    put(tmp_path, "aokvqa_v1p0_train.json", [{"image_id": 1, "choices": ["a"], "query": "x"}])
    notes = Annotations("aokvqa", tmp_path)
    assert list(read(notes)) == []
    assert notes.examples == {
        "missing question": "aokvqa_v1p0_train.json, record 0 has no field 'question'; "
        "found image_id, choices, query."
    }


def test_every_set_says_which_file_it_lacks(tmp_path):
    for name in SETS:
        with pytest.raises(
            FileNotFoundError, match=rf"{name.replace('+', '.')} needs .* put the file"
        ):
            list(read(Annotations(name, tmp_path)))
    with pytest.raises(ValueError, match="set 'vqa3' is unknown; choose from coco_caption"):
        list(read(Annotations("vqa3", tmp_path)))
