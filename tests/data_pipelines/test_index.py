"""`build index` and `build verify`: counts, indexes, manifests, what is broken."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile

import fsspec
import pytest

from data_pipelines import build
from data_pipelines import manifest as manifests
from data_pipelines.build import index as indexing
from data_pipelines.sources import tar
from tests.data_pipelines.shards import JPEG, write_array_record, write_parquet, write_tar


def command(*arguments) -> int:
    return build.main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        (tmp_path / f"part{i % 2}").mkdir(exist_ok=True)
        write_tar(tmp_path / f"part{i % 2}" / f"{i:05d}.tar", 4, 4 * i)
        (tmp_path / f"part{i % 2}" / f"{i:05d}_stats.json").write_text("{}")
        write_parquet(tmp_path / f"part{i % 2}" / f"{i:05d}.parquet", 4)
    return tmp_path


def test_img2dataset_output_in_two_processes(folder, capsys):
    assert command("index", folder, "--workers", 2) == 0
    said = capsys.readouterr()
    assert "24 pairs in 6 files" in said.out and "24 records" in said.err
    corpus = manifests.open_corpus(folder)
    order = [0, 2, 4, 1, 3, 5]
    keys = [f"{4 * shard + i:09d}" for shard in order for i in range(4)]
    assert [corpus.sample(i).key for i in range(24)] == keys
    assert command("verify", folder, "--workers", 2) == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "part0",
        "part1",
        "shards.arrow",
    ]


def test_indexing_again_reads_only_what_changed(folder, monkeypatch):
    assert command("index", folder, "--workers", 1) == 0
    before = manifests.open_corpus(folder).digest
    scanned, scan = [], tar.scan
    monkeypatch.setattr(tar, "scan", lambda path: scanned.append(path) or scan(path))
    assert command("index", folder, "--workers", 1) == 0
    assert not scanned and manifests.open_corpus(folder).digest == before
    changed = write_tar(folder / "part0" / "00002.tar", 9)
    assert command("index", folder, "--workers", 1) == 0
    assert scanned == [str(changed)] and len(manifests.open_corpus(folder)) == 29


@pytest.mark.parametrize("digest", ["ends", "full"])
def test_an_interrupted_run_goes_on(folder, monkeypatch, digest):
    true, computed = manifests.digest_of, []

    def interrupted(path, kind):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(path)
        return true(path, kind)

    monkeypatch.setattr(manifests, "digest_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command("index", folder, "--workers", 1, "--digest", digest)
    assert not (folder / "manifest.json").exists()
    with (folder / ".index.jsonl").open("a") as journal:
        journal.write('{"name": "part1/00001.tar", "resu')  # torn by a crash
    monkeypatch.setattr(
        manifests, "digest_of", lambda path, kind: computed.append(path) or true(path, kind)
    )
    assert command("index", folder, "--workers", 1, "--digest", digest) == 0
    assert len(computed) == 6 and len(set(computed)) == 6
    corpus = manifests.open_corpus(folder)
    assert len(corpus) == 24 and not (folder / ".index.jsonl").exists()
    if digest == "full":
        data = (folder / "part0" / "00000.tar").read_bytes()
        assert corpus.shards.shard(0).digest == hashlib.sha256(data).digest()


def test_other_settings_do_not_mix(folder, capsys):
    (folder / ".index.jsonl").write_text(json.dumps({"root": "elsewhere"}) + "\n")
    assert command("index", folder, "--workers", 1) == 78
    assert "was begun with another root and format and digest; delete" in capsys.readouterr().err


def test_broken_shards_are_listed_and_skipped(folder, capsys):
    broken = folder / "part0" / "00002.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    assert command("index", folder, "--workers", 1) == 65
    said = capsys.readouterr().err
    assert f"skipped: {broken} is cut off" in said and "1 of the 6 files" in said
    assert not (folder / "manifest.json").exists()
    assert command("index", folder, "--workers", 1, "--max_bad", 0.2) == 0
    corpus = manifests.open_corpus(folder)
    assert len(corpus) == 20 and corpus.manifest.shards == 5


def test_fields_are_named_or_found(folder, capsys):
    assert command("index", folder, "--caption", "json/title", "--workers", 1) == 78
    said = capsys.readouterr().err
    assert "has no field 'json/title' for the caption" in said and "json/caption" in said
    assert command("index", folder, "--caption", "json/key", "--language", "=en") == 0
    caption = manifests.open_corpus(folder).sample(0).captions[0]
    assert (caption.text, caption.language) == ("000000000", "en")


def test_a_folder_without_files(tmp_path, capsys):
    (tmp_path / "a.zip").write_text("")
    assert command("index", tmp_path) == 78
    assert "holds no tar, array_record or parquet files; found .zip." in capsys.readouterr().err


def test_folders_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    """Left out in silence, their records would be missing."""
    assert command("index", tmp_path / "typo") == 78
    assert "No such file or directory" in capsys.readouterr().err
    write_tar(tmp_path / "0.tar", 2)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert command("index", tmp_path, "--workers", 1) == 78
    said = capsys.readouterr().err
    assert "Permission denied" in said and "closed" in said


def test_a_validation_folder_is_a_set_by_itself(tmp_path, capsys):
    (tmp_path / "validation").mkdir()
    write_tar(tmp_path / "0.tar", 3)
    write_tar(tmp_path / "validation" / "0.tar", 2, 3)
    assert command("index", tmp_path, "--workers", 1) == 0
    assert len(manifests.open_corpus(tmp_path)) == 3
    assert f"{tmp_path}/validation holds what is not trained on" in capsys.readouterr().err
    assert command("index", tmp_path / "validation", "--workers", 1) == 0
    assert command("index", tmp_path, "--workers", 1) == 0
    assert "not trained on" not in capsys.readouterr().err
    assert len(manifests.open_corpus(tmp_path)) == 3


def test_fewer_records_than_are_looked_at(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("twice.txt"))
    assert command("index", tmp_path, "--workers", 1) == 78
    assert "has two members 'txt'" in capsys.readouterr().err


def test_parquet(tmp_path):
    for i in range(3):
        write_parquet(tmp_path / f"train-{i:05d}-of-00003.parquet", 5)
    assert command("index", tmp_path, "--language", "about/lang", "--workers", 1) == 0
    corpus = manifests.open_corpus(tmp_path)
    assert len(corpus) == 15 and corpus.manifest.format == "parquet"
    sample = corpus.sample(7)
    assert sample.images == (JPEG + b"2",) and sample.captions[0].language == "it"
    assert command("verify", tmp_path, "--workers", 1) == 0


def test_an_object_store_in_place_and_from_outside(folder, tmp_path_factory):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/indexed", recursive=True)
    try:
        assert command("index", "memory://indexed", "--workers", 1) == 0
        corpus = manifests.open_corpus("memory://indexed")
        assert corpus.sample(23).key == "000000023" and corpus.manifest.root == "."
        assert command("verify", "memory://indexed", "--workers", 1) == 0
        out = tmp_path_factory.mktemp("out")
        assert command("index", "memory://indexed", "--out", out, "--workers", 1) == 0
        outside = manifests.open_corpus(out)
        assert outside.manifest.root == "memory://indexed" and outside.digest == corpus.digest
        assert outside.sample(23).key == "000000023"
        assert (out / "part1" / "00005.tar.idx").is_file()
    finally:
        memory.rm("/indexed", recursive=True)


def test_verify_says_what_is_wrong(folder, capsys):
    assert command("index", folder, "--workers", 1) == 0
    tars = [folder / f"part{i % 2}" / f"{i:05d}.tar" for i in range(6)]
    data = bytearray(tars[0].read_bytes())
    data[600] ^= 1
    tars[0].write_bytes(data)
    size = tars[2].stat().st_size
    tars[2].write_bytes(tars[2].read_bytes() + bytes(512))
    tars[4].unlink()
    (folder / "part1" / "00001.tar.idx").write_bytes(b"x")
    capsys.readouterr()
    assert command("verify", folder, "--workers", 1) == 65
    said = capsys.readouterr()
    assert f"{tars[0]} has other content than when it was indexed." in said.err
    assert f"{tars[2]} has {size + 512} bytes instead of {size}." in said.err
    assert "00004.tar" in said.err and "00001.tar.idx is no index of a tar" in said.err
    assert "4 problems" in said.out
    table = folder / manifests.TABLE
    packed = table.read_bytes()
    at = packed.index(size.to_bytes(8, "little"))
    table.write_bytes(packed[:at] + b"\1" + packed[at + 1 :])
    assert command("verify", folder, "--workers", 1) == 78
    assert "shards.arrow is not the one that manifest.json was" in capsys.readouterr().err
    (folder / manifests.MANIFEST).unlink()
    assert command("verify", folder) == 78


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as TFDS prepares it, nested fields and a sequence of texts included."""
    import numpy as np
    import tensorflow_datasets as tfds

    from data_pipelines.build.demo import _quiet

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="png"),
                        "captions": tfds.features.Sequence(tfds.features.Text()),
                        "about": {"lang": tfds.features.Text(), "age": np.int64},
                    }
                )
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 7), "test": self._generate_examples(7, 9)}

        def _generate_examples(self, start, stop):
            import io

            from PIL import Image

            for i in range(start, stop):
                data = io.BytesIO()
                Image.new("RGB", (2, 2), (i, 0, 0)).save(data, "PNG")
                data.seek(0)
                about = {"lang": "it", "age": i}
                yield i, {"image": data, "captions": [f"pet {i}", "a pet"], "about": about}

    data_dir = tmp_path_factory.mktemp("tfds")
    Pets.pkg_dir_path = data_dir
    builder = Pets(data_dir=str(data_dir), file_format="array_record")
    with _quiet():
        builder.download_and_prepare()
    return data_dir / "pets" / "1.0.0"


def test_what_tfds_prepared(prepared, monkeypatch):
    # The counts are TFDS's own: no file is opened for them.
    monkeypatch.setattr(indexing, "count_records", lambda *_: pytest.fail("opened"))
    assert command("index", prepared, "--language", "about/lang", "--workers", 1) == 0
    corpora = [manifests.open_corpus(prepared), manifests.open_corpus(prepared / "test")]
    assert [len(corpus) for corpus in corpora] == [7, 2]
    texts = set()
    for corpus in corpora:
        for i in range(len(corpus)):
            sample = corpus.sample(i)
            assert sample.images[0][:4] == b"\x89PNG" and sample.captions[1].text == "a pet"
            assert sample.captions[0].language == "it" and corpus.source[i]["about/age"] < 9
            texts.add(sample.captions[0].text)
    assert texts == {f"pet {i}" for i in range(9)}


def test_tfds_folders_that_cannot_be_read(tmp_path, capsys):
    info = {"fileFormat": "tfrecord", "splits": [{"name": "train", "shardLengths": ["5"]}]}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert command("index", tmp_path) == 78
    assert "as tfrecord; prepare it with file_format='array_record'" in capsys.readouterr().err
    info["fileFormat"] = "array_record"
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert command("index", tmp_path) == 78
    assert "has 0 files of the split 'train' instead of 1" in capsys.readouterr().err


def test_array_records_of_something_else(tmp_path, capsys):
    write_array_record(tmp_path / "a.array_record", 3)
    assert command("index", tmp_path, "--workers", 1) == 78
    assert "first records of" in capsys.readouterr().err
    (tmp_path / "a.array_record").write_bytes(b"x" * 5000)
    assert command("index", tmp_path, "--workers", 1) == 65
    assert "a.array_record cannot be read as ArrayRecord" in capsys.readouterr().err
