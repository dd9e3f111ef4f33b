"""Building a set and reading it back, through TFDS and through our own source."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import build, datasets
from data_pipelines.image import decode
from data_pipelines.pipeline import make_pipeline
from data_pipelines.shapes.draw import make_dataset


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    assert build.main(["shapes", "--data_dir", str(data_dir), "--vocab_size", "600"]) == 0
    return data_dir, datasets.folder_of("shapes", data_dir)


def test_tfds_reads_it(built):
    source = tfds.builder_from_directory(str(built[1])).as_data_source()
    dataset = make_dataset()
    assert {split: len(part) for split, part in source.items()} == {
        split: len(records) for split, records in dataset.splits.items()
    }
    record = source["held_out"][0]
    key = record["concept"].decode()
    concept = next(concept for concept in dataset.concepts if concept.key == key)
    assert record["vendor"] == b"turned" and record["group"].decode() == concept.group
    names = {code: name.decode() for code, name in record["names"].items()}
    assert {code: name for code, name in names.items() if name} == concept.names
    assert record["keywords"]["it"].decode() == " | ".join(concept.keywords["it"])
    assert record["image"].shape == (64, 64, 3)


def test_a_folder_holds_what_was_drawn(built):
    read, drawn = datasets.read_folder("built", built[1]), make_dataset()
    assert read.concepts == drawn.concepts
    place = {(int(c), v): i for i, (c, v) in enumerate(zip(drawn.concept, drawn.vendor))}
    assert len(read.pictures) == len(place)
    for split, records in read.splits.items():
        pairs = [place[int(read.concept[r]), read.vendor[r]] for r in records]
        assert sorted(pairs) == drawn.splits[split].tolist()
        np.testing.assert_array_equal(
            decode(read.pictures[int(records[0])]), decode(drawn.pictures[pairs[0]])
        )


def test_a_folder_serves_a_pipeline_with_its_own_tokenizer(built):
    config = {"dataset": str(built[1]), "image_size": 16, "text_length": 24}
    host = make_pipeline(config, "contrastive", global_batch=4, seed=0).batch(0)
    assert host.arrays["image"].shape == (4, 16, 16, 3) and host.valid.all()


def test_a_second_build_keeps_everything(built):
    data_dir, folder = built
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines = []
    assert build.build("shapes", data_dir, report=lines.append) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()} and not lines


def test_an_unfinished_folder_is_built_again(tmp_path):
    folder = datasets.folder_of("shapes", tmp_path)
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{")
    (folder.parent / f"incomplete.ABC_{folder.name}").mkdir()
    build.build("shapes", tmp_path, vocab_size=600, report=lambda line: None)
    assert list(folder.parent.iterdir()) == [folder]
    assert len(datasets.read_folder("shapes", folder).pictures) == 144


def test_lost_records_are_noticed(built):
    from data_pipelines import records

    counts = {split: len(part) for split, part in make_dataset().splits.items()}
    with pytest.raises(ValueError, match="90 records of the split 'train' instead of 91"):
        records.finish(built[1], make_dataset().concepts, {**counts, "train": 91})


def test_unknown_sets(tmp_path):
    with pytest.raises(ValueError, match="no recipe for the data set 'laion'"):
        build.build("laion", tmp_path)
