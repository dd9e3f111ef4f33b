"""Handmade files with the layout of every source, and the types that mirrors gave them."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.metadata.read import ROWS, MetadataError, expand, read
from data_pipelines.metadata.schema import SCHEMA

NAN = float("nan")


def rows(path, source, **more) -> list[dict]:
    return pa.Table.from_batches(list(read(str(path), source, **more)), None).to_pylist()


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def near(value):
    return None if value is None else pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("size", [pa.int32(), pa.int64(), pa.float64(), pa.string()])
@pytest.mark.parametrize("score", [pa.float32(), pa.float64()])
@pytest.mark.parametrize("aesthetic", ["aesthetic", "AESTHETIC_SCORE"])
def test_laion(tmp_path, size, score, aesthetic):
    width = pa.array([640, None], pa.int32()).cast(size)
    path = parquet(
        tmp_path / "a.parquet",
        SAMPLE_ID=pa.array([1, 2]),
        URL=["http://a.com/1.jpg", None],
        TEXT=["a cat", ""],
        HEIGHT=pa.array([480, 0]).cast(size),
        WIDTH=width,
        LICENSE=["?", "?"],
        NSFW=["NSFW", "UNLIKELY"],
        LANGUAGE=["it", None],
        similarity=pa.array([0.3, NAN], pa.float64()),
        pwatermark=pa.array([0.5, None], score),
        punsafe=pa.array([0.25, NAN], score),
        **{aesthetic: pa.array([5.5, None], score)},
    )
    first, second = rows(path, "laion_multi")
    assert (first["url"], first["caption"], first["lang"]) == ("http://a.com/1.jpg", "a cat", "it")
    assert (first["width"], first["height"], first["source"]) == (640, 480, "laion_multi")
    scores = ("similarity", "pwatermark", "punsafe", "aesthetic")
    assert [first[s] for s in scores] == [near(x) for x in (0.3, 0.5, 0.25, 5.5)]
    empty = (*scores, "url", "width", "height", "lang", "phash", "sha256", "status", "key")
    assert all(second[field] is None for field in empty) and second["caption"] == ""
    assert rows(path, "laion_en")[1]["lang"] == "en"


def test_laions_tag_stands_in_for_a_missing_probability(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", URL=["u"] * 4, TEXT=["t"] * 4,
        NSFW=["NSFW", "UNSURE", "UNLIKELY", None],
    )  # fmt: skip
    assert [r["punsafe"] for r in rows(path, "laion_en")] == [1.0, None, None, None]


def test_laion_coco_takes_the_generated_caption(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", URL=["u"], TEXT=["alt"], top_caption=["a dog"],
        all_captions=[["a dog", "dog"]], all_similarities=[[0.3, 0.2]],
        WIDTH=[3.0], HEIGHT=[NAN], similarity=[0.3], hash=[-5], pwatermark=[0.1], punsafe=[0.2],
    )  # fmt: skip
    (row,) = rows(path, "laion_coco")
    assert (row["caption"], row["width"], row["height"]) == ("a dog", 3, None)


def test_coyo(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", id=[1, 2, 3], url=["u"] * 3, text=["t"] * 3,
        width=pa.array([4, 5, 6], pa.int32()), height=pa.array([4, 5, 6], pa.int32()),
        image_phash=["8f00000000000001", "xyz", None],
        clip_similarity_vitb32=[0.3, 0.3, 0.3], clip_similarity_vitl14=[0.2, 0.2, None],
        nsfw_score_opennsfw2=[0.01] * 3, nsfw_score_gantman=[0.9] * 3,
        watermark_score=[0.4] * 3, aesthetic_score_laion_v2=[5.0] * 3,
    )  # fmt: skip
    found = rows(path, "coyo")
    assert [r["phash"] for r in found] == [0x8F00000000000001, None, None]
    assert found[0]["similarity"] == near(0.2) and found[0]["punsafe"] == near(0.01)
    assert found[0]["pwatermark"] == near(0.4) and found[0]["aesthetic"] == near(5.0)


def test_wukong_is_csv_with_quotes_or_parquet(tmp_path):
    text = 'url,caption\nhttp://a,"红色, ""大"" 车\n两行"\nhttp://b,猫\n'
    plain, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    plain.write_text("\ufeff" + text, "utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    mirror = parquet(
        tmp_path / "a.parquet", url=["http://a", "http://b"], caption=['红色, "大" 车\n两行', "猫"]
    )
    want = [("http://a", '红色, "大" 车\n两行', "zh"), ("http://b", "猫", "zh")]
    for path in (plain, packed, mirror):
        assert [(r["url"], r["caption"], r["lang"]) for r in rows(path, "wukong")] == want


def test_the_conceptual_sets_have_no_header_and_opposite_columns(tmp_path):
    for source, line in (("cc3m", 'a "dog\thttp://a\n'), ("cc12m", 'http://a\ta "dog\n')):
        path = tmp_path / f"{source}.tsv"
        path.write_text(line)
        (row,) = rows(path, source)
        assert (row["url"], row["caption"], row["lang"]) == ("http://a", 'a "dog', "en")


def test_lines_that_are_broken(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"good\thttp://a\nno tab\ncaf\xe9\thttp://b\na\tb\tc\n\thttp://c\n")
    broken = []
    found = rows(path, "cc3m", malformed=lambda: broken.append(1))
    assert len(broken) == 2
    assert [(r["url"], r["caption"]) for r in found] == [
        ("http://a", "good"), ("http://b", None), ("http://c", "")
    ]  # fmt: skip


def test_sbu_is_parallel_lists(tmp_path):
    path = tmp_path / "a.json"
    lists = {"image_urls": ["http://a", "http://b"], "user_ids": ["1", "2"], "captions": ["x", "y"]}
    path.write_text(json.dumps(lists))
    assert [(r["url"], r["caption"]) for r in rows(path, "sbu")] == [
        ("http://a", "x"), ("http://b", "y")
    ]  # fmt: skip
    path.write_text(json.dumps({**lists, "captions": ["x"]}))
    with pytest.raises(MetadataError, match="lists differ in length: image_urls has 2"):
        rows(path, "sbu")


def test_datacomp_keeps_its_uid(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", uid=["0123456789abcdef" * 2, "short"], url=["u", "v"],
        text=["t", "t"], original_width=[2, 3], original_height=[2, 3],
        clip_b32_similarity_score=[0.3, 0.3], clip_l14_similarity_score=[0.2, 0.2],
        face_bboxes=[[[0.1, 0.2, 0.3, 0.4]], []], sha256=["AB" * 32, None],
    )  # fmt: skip
    first, second = rows(path, "datacomp")
    assert first["uid"].hex() == "0123456789abcdef" * 2 and first["sha256"] == "ab" * 32
    assert second["uid"] == rows(path, "datacomp")[1]["uid"] != first["uid"]


def test_img2datasets_own_table(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", caption=["x", "y"], url=["u", "v"], key=["000000000", "000000001"],
        status=["success", "failed_to_download"], error_message=[None, "404"],
        width=pa.array([256, None], pa.int32()), height=pa.array([256, None], pa.int32()),
        original_width=pa.array([800, None], pa.int32()),
        original_height=pa.array([600, None], pa.int32()),
        exif=["{}", None], sha256=["cd" * 32, None], similarity=[0.3, 0.4],
    )  # fmt: skip
    first, second = rows(path, "img2dataset")
    assert (first["width"], first["height"], first["status"]) == (800, 600, "success")
    assert (second["width"], second["status"]) == (None, "failed_to_download")
    assert first["key"] == "000000000" and first["similarity"] == near(0.3)


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"url": "u", "caption": "c"}\n{"url": "v", "caption": null}\n')
    assert [(r["url"], r["caption"]) for r in rows(path, "cc3m")] == [("u", "c"), ("v", None)]


def test_a_missing_column_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", URL=["u"], CAPTION=["t"])
    with pytest.raises(
        MetadataError,
        match=r"a\.parquet has no column TEXT for the caption; its columns are URL, CAPTION\.",
    ):
        rows(path, "laion_en")
    with pytest.raises(MetadataError, match="No source is called 'laion'"):
        rows(path, "laion")
    bad = tmp_path / "b.parquet"
    bad.write_bytes(b"PAR1 nothing")
    with pytest.raises(MetadataError, match=r"b\.parquet cannot be read as coyo"):
        rows(bad, "coyo")
    with pytest.raises(MetadataError, match="ends in none of"):
        rows(tmp_path / "a.xlsx", "coyo")


def test_fields_rows_and_schema(tmp_path):
    count = ROWS + 10
    path = parquet(tmp_path / "a.parquet", URL=[f"u{i}" for i in range(count)], TEXT=["t"] * count)
    batches = list(read(str(path), "laion_en"))
    assert all(b.schema == SCHEMA and b.num_rows <= ROWS for b in batches)
    assert sum(b.num_rows for b in batches) == count
    (batch, _) = read(str(path), "laion_en", ["width", "url"])
    assert batch.schema.names == ["width", "url"]
    keep = np.zeros(count, bool)
    keep[[3, count - 1]] = True
    assert [r["url"] for r in rows(path, "laion_en", keep=keep)] == ["u3", f"u{count - 1}"]
    with pytest.raises(MetadataError, match=f"had 5 rows when it was scanned and has {count} now"):
        rows(path, "laion_en", keep=np.ones(5, bool))


def test_expand(tmp_path):
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).write_text("xy")
    found = expand([f"{tmp_path}/*.csv", f"{tmp_path}/a.csv", f"{tmp_path}/none.csv"])
    assert found == [(f"{tmp_path}/a.csv", 2), (f"{tmp_path}/b.csv", 2)]
