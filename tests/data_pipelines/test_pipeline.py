"""The pipeline is a pure function of seed and step, whatever hosts and threads."""

from __future__ import annotations

import collections
import dataclasses
import pickle
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import pipeline as pipelines
from data_pipelines.config import DataConfig, as_data_config
from data_pipelines.datasets import open_dataset
from data_pipelines.drawing import BadRecordsError, Example, Examples
from data_pipelines.examples import make_builder
from data_pipelines.pipeline import Pipeline, make_pipeline
from data_pipelines.sets.captions import fits
from data_pipelines.sets.concepts import Concepts, Pictures
from data_pipelines.sources.memory import MemorySource
from internvl_jax import batch as batches
from internvl_jax.batch import IGNORE, IMAGE_TOKEN, STAGES
from internvl_jax.crop import crop_resize


@pytest.fixture
def config(tokenizer_path) -> dict:
    return {
        "dataset": "shapes",
        "tokenizer": str(tokenizer_path),
        "image_size": 16,
        "text_length": 128,
        "visual_tokens": 4,
        "image_slots": 2,
        "texts": ("name", "keywords", "caption", "summarize", "translation", "dialogue"),
    }


def assert_equal(one, other):
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)
    np.testing.assert_array_equal(one.records, other.records)
    np.testing.assert_array_equal(one.valid, other.valid)
    assert one.reasons == other.reasons


def joined(parts):
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays
    }
    records = np.concatenate([part.records for part in parts])
    valid = np.concatenate([part.valid for part in parts])
    reasons = sum((collections.Counter(part.reasons) for part in parts), collections.Counter())
    return pipelines.HostBatch(arrays, records, valid, reasons)


@pytest.mark.parametrize("stage", STAGES)
def test_batches_are_what_the_spec_says(config, stage):
    pipeline = make_pipeline(config, stage, global_batch=6, seed=0)
    host = pipeline.batch(0)
    found = {name: (array.shape, array.dtype) for name, array in host.arrays.items()}
    assert found == pipeline.spec()
    assert host.records.dtype == np.int64 and host.records.shape == (6,)
    assert host.valid.all() and not host.reasons


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("stage", ["contrastive", "generative", "finetune"])
def test_cropping_on_the_device_gives_the_same_pictures(config, stage, split):
    options = dict(global_batch=6, seed=0, split=split)
    config |= {"image_size": 32, "flip": 0.5}
    on_host = make_pipeline({**config, "resample": "exact"}, stage, **options).batch(0).arrays
    pipeline = make_pipeline({**config, "canvas": 72}, stage, **options)
    sent = pipeline.batch(0).arrays
    assert {name: (array.shape, array.dtype) for name, array in sent.items()} == pipeline.spec()
    canvases, boxes = sent["image"].reshape(-1, 72, 72, 3), sent["crop"].reshape(-1, 5)
    found = np.asarray(crop_resize(jnp.asarray(canvases), jnp.asarray(boxes), 32)).reshape(
        on_host["image"].shape
    )
    assert np.abs(found - on_host["image"]).mean() < 0.3
    for name in on_host.keys() - {"image"}:
        np.testing.assert_array_equal(sent[name], on_host[name])


@pytest.mark.parametrize("stage", STAGES)
def test_hosts_take_contiguous_slices_of_one_batch(config, stage):
    whole = make_pipeline(config, stage, global_batch=12, seed=3).batch(5)
    for count in (2, 3, 4):
        parts = [
            make_pipeline(
                config, stage, global_batch=12, seed=3, process_index=i, process_count=count
            ).batch(5)
            for i in range(count)
        ]
        assert_equal(joined(parts), whole)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_resume_change_nothing(config, threads):
    plain = make_pipeline(config, "generative", global_batch=4, seed=1)
    threaded = make_pipeline({**config, "threads": threads}, "generative", global_batch=4, seed=1)
    for start in (0, 7):
        for step, host in zip(range(start, start + 12), threaded.iterate(start)):
            assert_equal(host, plain.batch(step))
    threaded.close()


def test_every_thread_works():
    """However few batches are to be held ready."""
    together = threading.Barrier(6)

    class Waiting(Examples):
        def __init__(self):
            self.config, self.sets = DataConfig(dataset="shapes", threads=6, prefetch=2), ()

        def __getitem__(self, number):
            together.wait(20)
            return Example({"x": np.asarray(number)}, number, "")

    pipeline = Pipeline(Waiting(), {}, global_batch=1)
    assert next(pipeline.iterate()).arrays["x"] == 0
    together.abort()
    pipeline.close()


def test_iterations_can_be_left_and_begun_again(config):
    pipeline = make_pipeline(config, "contrastive", global_batch=4, seed=1)
    first = next(pipeline.iterate(2))
    iteration = pipeline.iterate(2)
    assert_equal(next(iteration), first)
    iteration.close()
    pipeline.close()
    assert_equal(next(pipeline.iterate(2)), first)
    pipeline.close()


def test_seeds_and_steps_differ(config):
    def records(seed, step):
        host = make_pipeline(config, "contrastive", global_batch=8, seed=seed).batch(step)
        return tuple(host.records)

    assert len({records(seed, step) for seed in range(3) for step in range(3)}) == 9


def test_an_epoch_meets_every_training_concept_once(config):
    dataset = open_dataset("shapes")
    seen = sum(not concept.unseen for concept in dataset.concepts)
    pipeline = make_pipeline(config, "contrastive", global_batch=seen, seed=0)
    orders = []
    for epoch in range(2):
        host = pipeline.batch(epoch)
        shown = dataset.concept[host.records]
        assert collections.Counter(shown) == {
            i: 1 for i, concept in enumerate(dataset.concepts) if not concept.unseen
        }
        assert set(host.records) <= set(dataset.splits["train"])
        orders.append(tuple(shown))
    assert orders[0] != orders[1]


def test_every_training_drawing_is_drawn_in_time(config):
    pipeline = make_pipeline(config, "contrastive", global_batch=64, seed=0)
    met = {int(record) for step in range(10) for record in pipeline.batch(step).records}
    assert met == set(open_dataset("shapes").splits["train"].tolist())


def test_a_phase_of_another_size_sees_the_same_examples(config):
    small, large = (
        make_pipeline({**config, "image_size": size}, "contrastive", global_batch=6, seed=2)
        for size in (16, 32)
    )
    one, other = small.batch(4), large.batch(4)
    np.testing.assert_array_equal(one.records, other.records)
    np.testing.assert_array_equal(one.arrays["text"], other.arrays["text"])
    assert other.arrays["image"].shape == (6, 32, 32, 3)


def test_validation_is_not_cropped_and_not_trained_on(config):
    dataset = open_dataset("shapes")
    cropped = {**config, "crop_scale": (0.1, 0.2)}
    plain, other = (
        make_pipeline(c, "contrastive", global_batch=6, seed=0, split="validation").batch(0)
        for c in (config, cropped)
    )
    np.testing.assert_array_equal(plain.arrays["image"], other.arrays["image"])
    assert set(plain.records) == set(dataset.splits["validation"])
    text = make_pipeline(config, "language", global_batch=4, seed=0, split="validation").batch(0)
    assert all(dataset.concepts[number].unseen for number in text.records)


def test_groups_can_be_left_out(config):
    dataset = open_dataset("shapes")
    settings = {**config, "skip_groups": ("star", "circle")}
    for stage in ("contrastive", "language"):
        host = make_pipeline(settings, stage, global_batch=64, seed=0).batch(0)
        shown = host.records if stage == "language" else dataset.concept[host.records]
        assert {dataset.concepts[i].group for i in shown} == {
            "triangle", "square", "pentagon", "hexagon",
        }  # fmt: skip


# What the stages hold


def test_contrastive_text_is_the_name_of_what_is_shown(config, tokenizer):
    dataset = open_dataset("shapes")
    host = make_pipeline(config, "contrastive", global_batch=32, seed=0).batch(0)
    languages = collections.Counter()
    for row, mask, record in zip(host.arrays["text"], host.arrays["text_mask"], host.records):
        assert row[0] == 1 and row[mask][-1] == 2
        names = dataset.concepts[dataset.concept[record]].names
        said = tokenizer.decode(row).removeprefix("summarize:")
        languages[next(code for code, name in names.items() if name == said)] += 1
    assert len(languages) == 5


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 64, 64), (0.5, 16, 48), (0.0, 0, 0)])
def test_a_share_of_the_captions_has_the_prefix(config, tokenizer, share, low, high):
    pipeline = make_pipeline(
        {**config, "prefix_share": share}, "contrastive", global_batch=64, seed=0
    )
    said = [tokenizer.decode(row) for row in pipeline.batch(0).arrays["text"]]
    assert low <= sum(text.startswith("summarize:") for text in said) <= high


def test_generative_rows(config, tokenizer):
    dataset = open_dataset("shapes")
    host = make_pipeline({**config, "keyword_share": 0.5}, "generative", global_batch=64, seed=0)
    host = host.batch(0)
    prompts = {f"{name} caption:": code for code, name in batches.LANGUAGES.items()}
    kinds = collections.Counter()
    for i, record in enumerate(host.records):
        arrays = {name: array[i] for name, array in host.arrays.items()}
        concept = dataset.concepts[arrays["image_id"]]
        assert concept is dataset.concepts[dataset.concept[record]]
        caption, negative = (
            tokenizer.decode(arrays["positive"]),
            tokenizer.decode(arrays["negative"]),
        )
        assert tokenizer.decode(arrays["summarize"]) == "summarize:" + caption
        ids, labels = arrays["text"], arrays["labels"]
        start = int(np.argmax(labels != IGNORE))
        prompt = tokenizer.decode(ids[: start + 1])
        language = prompts[prompt]
        # All but the prompt's head and the pads is learned; the colon is the last of the prompt.
        count = int(arrays["text_mask"].sum())
        np.testing.assert_array_equal(labels[start:count], ids[start:count])
        assert (labels[:start] == IGNORE).all() and (labels[count:] == IGNORE).all()
        assert ids[count - 1] == 2
        body = [1, *ids[start + 1 : count]]
        np.testing.assert_array_equal(body, arrays["positive"][arrays["positive_mask"]])
        assert fits(caption, concept, language) and not fits(negative, concept, language)
        kinds["name" if caption == concept.names[language] else "keywords"] += 1
    assert min(kinds.values()) > 10


def test_finetune_rows(config, tokenizer):
    host = make_pipeline(config, "finetune", global_batch=48, seed=0).batch(0)
    image = host.arrays["image"]
    assert image[:, 0].any(axis=(1, 2, 3)).all() and not image[:, 1:].any()
    answers = set()
    for ids, mask, labels in zip(*(host.arrays[n] for n in ("text", "segment", "labels"))):
        mask = mask > 0
        assert (ids == IMAGE_TOKEN).sum() == 4
        learned = labels != IGNORE
        assert learned.any() and not learned[~mask].any()
        np.testing.assert_array_equal(labels[learned], ids[learned])
        assert (ids[learned] == 2).sum() == (ids[mask] == 2).sum() >= 1
        answers |= {tokenizer.decode(part) for part in np.split(ids[learned], _ends(ids[learned]))}
    assert {"Yes", "No", "Italian", "red star"} & answers >= {"Yes", "No"}
    assert len(answers) > 15


def _ends(ids):
    return np.flatnonzero(ids == 2)[:-1] + 1


def test_long_conversations_lose_whole_rounds(config, tokenizer):
    short = make_pipeline({**config, "text_length": 72}, "finetune", global_batch=64, seed=0)
    long = make_pipeline(config, "finetune", global_batch=64, seed=0)
    rounds = []
    for arrays, whole in zip(*(p.batch(0).arrays["text"] for p in (short, long))):
        rounds.append(((arrays == 2).sum(), (whole == 2).sum()))
        row = arrays[arrays != tokenizer.pad_id]
        np.testing.assert_array_equal(row, whole[: len(row)])
        assert row[-1] == 2
    assert any(one < other for one, other in rounds)


def test_questions_of_the_kinds_asked_for(config, tokenizer):
    config = {**config, "questions": ("is", "is", "what"), "text_length": 200}
    host = make_pipeline(config, "finetune", global_batch=64, seed=0).batch(0)
    told = [tokenizer.decode(np.where(row < 0, 0, row)) for row in host.arrays["text"]]
    asked = [text.split("USER: ")[1:] for text in told]
    assert {len(questions) for questions in asked} == {1, 2, 3}
    closed = [[("Is this" in q or "Does the" in q) for q in questions] for questions in asked]
    assert not any("A. " in text or "which language" in text for text in told)
    assert all(kinds == sorted(kinds, reverse=True) for kinds in closed)  # closed questions first
    assert 0.5 < np.mean(np.concatenate(closed)) < 0.85


def test_language_rows_learn_all_but_bos_and_of_dialogues_the_answers(config, tokenizer):
    host = make_pipeline(config, "language", global_batch=64, seed=0).batch(0)
    texts = []
    for ids, mask, labels in zip(*(host.arrays[n] for n in ("text", "text_mask", "labels"))):
        assert labels[0] == IGNORE and (labels[~mask] == IGNORE).all()
        text, learned = tokenizer.decode(ids), labels != IGNORE
        np.testing.assert_array_equal(labels[learned], ids[learned])
        if "ASSISTANT:" in text:
            assert 2 <= learned.sum() < mask.sum() - 20 and "<image>" not in text
        else:
            assert learned[1:][mask[1:]].all()
        texts.append(text)
    for sign in ("caption: ", "summarize:", " in Italian: ", "ASSISTANT:", ", "):
        assert any(sign in text for text in texts), sign


def test_texts_of_unseen_concepts_are_never_trained_on(config, tokenizer):
    dataset = open_dataset("shapes")
    names = [name for c in dataset.concepts if c.unseen for name in c.names.values()]
    for stage in ("language", "generative", "finetune"):
        pipeline = make_pipeline(config, stage, global_batch=64, seed=0)
        for host in (pipeline.batch(0), pipeline.batch(1)):
            rows = [
                row for key in host.arrays.keys() & {"text", "negative"} for row in host.arrays[key]
            ]
            said = " | ".join(tokenizer.decode(row) for row in rows)
            assert not [name for name in names if name in said]


# Broken records


def broken(config, fraction):
    dataset = open_dataset("shapes")
    rng = np.random.default_rng(0)
    data = [
        b"broken" if rng.random() < fraction else dataset.pictures[i]
        for i in range(len(dataset.pictures))
    ]
    dataset = dataclasses.replace(dataset, pictures=MemorySource(data))
    settings = as_data_config(config)
    tokenizer = pipelines.Tokenizer(settings.tokenizer)
    concepts = Concepts(dataset, Pictures(dataset, 1 << 20), "contrastive", "train", settings)
    examples = Examples(
        {"shapes": (concepts, ((0, 1.0),))},
        make_builder("contrastive", settings, tokenizer),
        settings,
        global_batch=16,
        seed=0,
        training=True,
    )
    spec = batches.spec("contrastive", batch=16, text_length=128, image_size=16)
    bad = {i for i, record in enumerate(data) if record == b"broken"}
    return examples, bad, lambda **hosts: Pipeline(examples, spec, global_batch=16, **hosts)


def test_broken_pictures_are_replaced_and_counted(config):
    examples, bad, make = broken(config, 0.2)
    host = make().batch(0)
    first_draws = [examples[number].reason for number in range(16)]
    assert set(first_draws) == {"", "not a picture"}
    np.testing.assert_array_equal(host.valid, [not reason for reason in first_draws])
    assert host.reasons == {"not a picture": int((~host.valid).sum())}
    assert not set(host.records) & bad
    assert_equal(host, make().batch(0))
    parts = [make(process_index=i, process_count=2).batch(0) for i in range(2)]
    assert_equal(joined(parts), host)


def test_nothing_readable_is_an_error(config):
    _, _, make = broken(config, 1.0)
    with pytest.raises(
        BadRecordsError, match="Example 0: 8 records in a row of shapes cannot be used"
    ):
        make().batch(0)
    with pytest.raises(BadRecordsError):
        next(make().iterate(0))


def test_pictures_fill_their_room_and_pickle(config):
    dataset = open_dataset("shapes")
    pictures = Pictures(dataset, 3 * 64 * 64 * 3)
    for record in range(6):
        np.testing.assert_array_equal(pictures[record], pictures[record])
    assert len(pictures._cache) == 3
    again = pickle.loads(pickle.dumps(pictures))
    assert not again._cache and again._room == 3 * 64 * 64 * 3


# Settings


def test_errors_are_sentences(config, tmp_path):
    def make(stage="contrastive", **settings):
        options = {
            name: settings.pop(name)
            for name in ("split", "process_count", "seed", "process_index")
            if name in settings
        }
        return make_pipeline(
            {**config, **settings}, stage, global_batch=6, **{"seed": 0, **options}
        )

    for match, call in {
        r"config\.data has no setting 'image_sise': did you mean image_size": {"image_sise": 3},
        r"data\.languages has 'xx'": {"languages": ("xx",)},
        r"data\.crop_scale must be two shares": {"crop_scale": (0, 2)},
        r"config\.data\.resample is 'best': use fast or exact": {"resample": "best"},
        r"data\.flip must be between 0 and 1": {"flip": 2.0},
        r"data\.resize must be one of center, pad, square": {"resize": "fill"},
        r"data\.template must be one of": {"template": "chatml"},
        r"data\.threads must be at least 1": {"threads": 0},
        r"data\.texts has 'poem'; choose from name": {"stage": "language", "texts": ("poem",)},
        r"text_length 40 leaves no room for an answer": {"stage": "finetune", "text_length": 40},
        r"6 does not divide over 4 hosts": {"process_count": 4},
        r"no host 3 among 2": {"process_count": 2, "process_index": 3},
        r"Split 'held_out' is not served": {"split": "held_out"},
        r"seed -1 is negative": {"seed": -1},
        r"Stage 'four' is unknown": {"stage": "four"},
        r"empty; look at data\.skip_groups": {
            "skip_groups": ("circle", "triangle", "square", "pentagon", "hexagon", "star")
        },
        r"vocabulary is 7;": {"vocab_size": 7},
    }.items():
        with pytest.raises(ValueError, match=match):
            make(**call)
    with pytest.raises(FileNotFoundError, match=r"not prepared in .*; run python -m"):
        make(dataset="emoji", data_dir=str(tmp_path))


def test_config_takes_dataclasses_and_lists():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        dataset: str = "shapes"
        image_size: int = 32
        languages: tuple = ("en",)

    assert as_data_config(Mine()) == DataConfig(dataset="shapes", image_size=32, languages=("en",))
    assert as_data_config({"dataset": "x", "languages": ["en", "it"]}).languages == ("en", "it")
