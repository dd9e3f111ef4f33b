"""Corpora in the pipeline: mixtures, hosts, bad records, packed rows."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.config import as_data_config
from data_pipelines.pipeline import make_pipeline
from data_pipelines.sample import BadRecordError, Caption, Sample, Turn
from data_pipelines.sets.corpus import CorpusSet
from data_pipelines.sets.packed import PackedSet, measure, pack
from internvl_jax.batch import IGNORE, IMAGE_TOKEN


def png(value: int, size: tuple[int, int] = (20, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256 % 256, 99)).save(out, "PNG")
    return out.getvalue()


@dataclasses.dataclass
class Memory:
    """A corpus in memory, in shards of ten."""

    samples: list[Sample | BadRecordError]
    kind: str = "pairs"
    folder: str = "memory"
    digest: str = "m"

    @property
    def ends(self) -> np.ndarray:
        return np.minimum(np.arange(10, len(self.samples) + 10, 10), len(self.samples))

    def sample(self, index: int) -> Sample:
        found = self.samples[index]
        if isinstance(found, BadRecordError):
            raise found
        return found

    def close(self) -> None:
        self.closed = True


def pairs(count: int, start: int = 0) -> Memory:
    return Memory(
        [
            Sample(f"{i}", (png(i),), captions=(Caption(f"number {i}"), Caption(f"{i}", "en")))
            for i in range(start, start + count)
        ]
    )


def talk(number: int, rounds: int, pictures: int = 1) -> Sample:
    head = "<image>\n" * pictures
    turns = []
    for i in range(rounds):
        turns += [Turn("human", f"{head}What is {number} and {i}?"), Turn("gpt", f"It is {i}.")]
        head = ""
    return Sample(f"{number}", tuple(png(number) for _ in range(pictures)), turns=tuple(turns))


@pytest.fixture
def corpora(monkeypatch):
    """Corpora by path; the rest is as it is."""
    made: dict[str, Memory] = {}

    def opened(folder, stage, split, near):
        if split == "validation":
            folder += "/validation"
        if folder not in made:
            raise FileNotFoundError(f"There is no manifest in {folder}.")
        return CorpusSet(made[folder], stage, near)

    monkeypatch.setattr(CorpusSet, "open", opened)
    return made


@pytest.fixture
def config(tokenizer_path) -> dict:
    return {
        "tokenizer": str(tokenizer_path),
        "image_size": 16,
        "text_length": 128,
        "visual_tokens": 4,
        "image_slots": 2,
        "mixture": {
            "one": {"path": "one", "weight": 3.0},
            "two": {"path": "two", "weight": [[0, 1.0], [5, 0.0], [9, 2.0]]},
            "shapes": {"path": "shapes", "weight": 0.5},
        },
    }


def shown(batch) -> list[tuple]:
    rows = zip(*(batch.arrays[name] for name in sorted(batch.arrays)), batch.records)
    return [tuple(np.asarray(x).tobytes() for x in row) for row in rows]


@pytest.mark.parametrize("order", ["global", "window"])
@pytest.mark.parametrize("stage", ["contrastive", "generative"])
def test_any_number_of_hosts_at_any_step(corpora, config, stage, order):
    """1 -> 2 -> 4 -> 3 hosts, mid-epoch, crops and captions the same."""
    corpora |= {"one": pairs(130), "two": pairs(37, 1000)}
    config |= {"order": order, "window": 16, "lanes": 2}
    whole = make_pipeline(config, stage, global_batch=12, seed=5)
    for count, steps in ((1, (0, 1)), (2, (2, 3)), (4, (4, 5, 6)), (3, (9, 10, 40))):
        hosts = [
            make_pipeline(
                config, stage, global_batch=12, seed=5, process_index=i, process_count=count
            )
            for i in range(count)
        ]
        for step in steps:
            parts = [row for host in hosts for row in shown(host.batch(step))]
            assert parts == shown(whole.batch(step))


def test_a_mixture_is_drawn_as_its_weights_say(corpora, config):
    corpora |= {"one": pairs(130), "two": pairs(37, 1000)}
    pipeline = make_pipeline(config, "contrastive", global_batch=60, seed=0)
    part_of = lambda records: np.searchsorted([130, 167], records, "right")
    counts = [np.bincount(part_of(pipeline.batch(s).records), minlength=3) for s in range(60)]
    middle = np.sum(counts[5:9], axis=0)
    assert middle[1] == 0 and middle[0] > 4 * middle[2] > 0
    said = {part.name: part for part in pipeline.drawn(60)}
    assert [said[name].examples for name in ("one", "two", "shapes")] == list(np.sum(counts, 0))
    assert said["two"].times == said["two"].examples / 37 > 10


def test_parts_without_weights_are_seen_equally_often(corpora, config):
    corpora |= {"one": pairs(130), "two": pairs(26, 1000)}
    config["mixture"] = {"one": {"path": "one"}, "two": {"path": "two"}}
    pipeline = make_pipeline(config, "contrastive", global_batch=64, seed=0)
    times = [part.times for part in pipeline.drawn(2560)]
    assert times == pytest.approx([1050.26, 1050.26], rel=1e-3)


def test_validation_takes_the_parts_that_have_it(corpora, config):
    corpora |= {"one": pairs(130), "two": pairs(37, 1000), "two/validation": pairs(8, 2000)}
    del config["mixture"]["shapes"]
    pipeline = make_pipeline(config, "contrastive", global_batch=8, seed=0, split="validation")
    assert [part.name for part in pipeline.drawn(1)] == ["two"]
    del corpora["two/validation"]
    with pytest.raises(FileNotFoundError, match="no manifest in two/validation"):
        make_pipeline(config, "contrastive", global_batch=8, seed=0, split="validation")


def test_generative_negatives_are_others_captions(corpora, config, tokenizer):
    corpora["one"] = pairs(40)
    config["mixture"] = {"one": {"path": "one"}}
    batch = make_pipeline(config, "generative", global_batch=40, seed=0).batch(0)
    for positive, negative, record in zip(
        batch.arrays["positive"], batch.arrays["negative"], batch.records
    ):
        own = {f"number {record}", f"{record}"}
        assert tokenizer.decode(positive) in own and tokenizer.decode(negative) not in own
    heads = {tokenizer.decode(row[:8]).split(":")[0] for row in batch.arrays["text"]}
    assert heads == {"English caption"}  # also where the language is not known


def test_windows_take_negatives_from_the_file_being_read():
    corpus = pairs(95)
    corpus.samples[90:] = [corpus.samples[90]] * 5  # a file of one caption
    read, sample = [], corpus.sample
    corpus.sample = lambda index: read.append(index) or sample(index)
    draw = CorpusSet(corpus, "generative", near=True).draw
    for unit in range(90):
        draw(unit, np.random.default_rng(unit))
        assert {index // 10 for index in read} == {unit // 10}
        read.clear()
    (made,) = draw(92, np.random.default_rng(0))[1]
    assert made.negative.text not in ("number 90", "90")


def test_validation_needs_no_lanes(corpora, config):
    corpora |= {"one": pairs(130), "one/validation": pairs(3)}
    config |= {"order": "window", "lanes": 4, "mixture": {"one": {"path": "one"}}}
    held_out = make_pipeline(config, "contrastive", global_batch=4, seed=0, split="validation")
    assert sorted(held_out.batch(0).records[:3]) == [0, 1, 2]
    held_out.close()
    assert corpora["one/validation"].closed


def test_a_digest_knows_records_not_places(corpora, config, tmp_path, tokenizer_path):
    def digest(stage="contrastive", **settings):
        return make_pipeline({**config, **settings}, stage, global_batch=4, seed=0).digest

    def mixture(path, weight):
        return {"one": {"path": path, "weight": weight}}

    corpora |= {"one": pairs(13), "moved": pairs(13), "two": pairs(9)}
    moved = tmp_path / "moved.model"
    moved.write_bytes(tokenizer_path.read_bytes())
    base = digest(mixture=mixture("one", 1.0))
    assert base == digest(mixture=mixture("moved", 1.0), tokenizer=str(moved))
    assert base == digest(mixture=mixture("one", 1.0), image_size=24, visual_tokens=9, canvas=40)
    assert base != digest(mixture=mixture("one", [[0, 1.0], [7, 2.0]]))
    assert base != digest(mixture=mixture("one", 1.0), order="window")
    corpora["moved"].digest = "other"
    assert base != digest(mixture=mixture("moved", 1.0))


def test_bad_records_are_substituted_and_counted_by_reason(corpora, config):
    good = pairs(60)
    bad = {3: BadRecordError("shard", "x"), 7: OSError("gone"), 11: png(5)[:40]}
    samples: list = list(good.samples)
    samples[3] = bad[3]
    samples[11] = dataclasses.replace(samples[11], images=(bad[11],))
    samples[20] = dataclasses.replace(samples[20], captions=())
    samples[21] = dataclasses.replace(samples[21], images=())
    corpora["one"] = Memory(samples)
    config["mixture"] = {"one": {"path": "one"}}
    batch = make_pipeline(config, "contrastive", global_batch=60, seed=0).batch(0)
    assert (~batch.valid).sum() == 4 and not {3, 11, 20, 21} & set(batch.records.tolist())
    assert batch.reasons["shard"] == batch.reasons["missing caption"] == 1
    assert batch.reasons["missing image"] == 1 and sum(batch.reasons.values()) == 4


def test_conversations_with_many_pictures_and_none(corpora, config, tokenizer):
    samples = [talk(0, 2, 2), talk(1, 1, 0), talk(2, 1, 3), talk(3, 30, 1), talk(4, 1, 1)]
    samples[4] = dataclasses.replace(samples[4], images=())
    corpora["one"] = Memory(samples, "conversations")
    config["mixture"] = {"one": {"path": "one"}}
    batch = make_pipeline(config, "finetune", global_batch=5, seed=0).batch(0)
    reasons = dict(batch.reasons)
    assert reasons == {"too many images": 1, "image count": 1}
    for image, text, segment, labels, record in zip(
        *(batch.arrays[name] for name in ("image", "text", "segment", "labels")), batch.records
    ):
        seen = len(samples[record].images)
        assert (text == IMAGE_TOKEN).sum() == 4 * seen
        assert [bool(slot.any()) for slot in image] == [i < seen for i in range(2)]
        assert set(segment) <= {0, 1} and not (labels[segment == 0] != IGNORE).any()
        if record == 3:
            assert (text == 2).sum() > 1 and text[segment > 0][-1] == 2  # whole rounds
    with pytest.raises(ValueError, match="memory holds conversations, but the contrastive stage"):
        make_pipeline(config, "contrastive", global_batch=5, seed=0)


def test_packing_fills_rows():
    rng = np.random.default_rng(0)
    tokens, pictures = rng.integers(1, 900, 20_000), rng.integers(0, 3, 20_000)
    tokens[5], tokens[6], pictures[7] = 0, 5000, 99
    order, starts = pack(tokens, pictures, room=2048, slots=16)
    assert sorted(order) == [i for i in range(20_000) if i not in (5, 7)]
    used = np.add.reduceat(tokens[order], starts[:-1])
    assert np.add.reduceat(pictures[order], starts[:-1]).max() <= 16
    alone = int(np.flatnonzero(order[starts[:-1]] == 6)[0])
    assert np.diff(starts)[alone] == 1
    assert np.delete(used, alone).max() <= 2048 and used.sum() / (len(used) * 2048) > 0.98


def test_packed_rows_hold_every_conversation_once(corpora, config, tokenizer):
    samples: list = [talk(i, 1 + i % 3, i % 2) for i in range(40)]
    samples[9] = BadRecordError("shard", "x")
    corpus = CorpusSet(Memory(samples, "conversations"), "finetune")
    settings = as_data_config({**config, "dataset": "one"})
    lengths = measure(corpus, settings, tokenizer)
    assert lengths[9].tolist() == [0, 0] and (np.delete(lengths, 9, 0)[:, 0] > 0).all()
    packed = PackedSet(corpus, lengths, settings)
    assert len(packed) < 30
    from data_pipelines.examples.finetune import FinetuneBuilder

    builder, met = FinetuneBuilder(settings, tokenizer), []
    for unit in range(len(packed)):
        _, drawn = packed.draw(unit, np.random.default_rng(0))
        met += [int(sample.key) for sample in drawn]
        images = [np.zeros((16, 16, 3), np.uint8) for sample in drawn for _ in sample.images]
        row = builder(drawn, images, np.random.default_rng(0))
        for number, sample in enumerate(drawn, 1):
            ids, labels = builder.rows(sample.turns)
            here = row["segment"] == number
            np.testing.assert_array_equal(row["text"][here], ids)
            np.testing.assert_array_equal(row["labels"][here], labels)
    assert sorted(met) == [i for i in range(40) if i != 9]


def test_settings_of_a_mixture_are_checked(config):
    for match, mixture in {
        r"config\.data\.mixture\.a has no setting 'wieght': did you mean weight": {
            "a": {"path": "x", "wieght": 1}
        },
        r"config\.data\.mixture\.a lacks the setting\(s\) path": {"a": {"weight": 1}},
        r"must rise from 0": {"a": {"path": "x", "weight": [[5, 1.0]]}},
        r"A weight of x is negative": {"a": {"path": "x", "weight": -1.0}},
    }.items():
        with pytest.raises(ValueError, match=match):
            as_data_config({**config, "mixture": mixture})
