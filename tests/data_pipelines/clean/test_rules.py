"""Every rule with what it keeps and what it drops, in several languages; null is no opinion."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.clean import captions, decontaminate, language, rules, signals
from data_pipelines.clean.config import (
    Captions,
    CleanConfig,
    Contamination,
    Language,
    Signals,
    Source,
)  # fmt: skip
from data_pipelines.metadata.schema import SCHEMA
from internvl_jax.config import ConfigError, build

STRICT = Captions(
    least=10, most=256, complete=True, letters=0.6, gibberish=True, boilerplate=True,
    repetition=0.4, offensive=True, placeholders=True, code=True,
)  # fmt: skip
GOOD = [
    "a brown dog on the beach",
    "The Menu of the old restaurant, 1950",
    "Sign with the words Do Not Enter in New York City",
    "the cat and the dog and the bird and the mouse",
    "<PERSON> at the premiere in London",
    "Angstschweiss und Borschtsch in der Nacht",
    "AC/DC live in 1991 (Moscow)",
    "黑色的猫坐在椅子上",
    "海辺の茶色い犬",
    "해변에 있는 갈색 개",
    "قطة سوداء تجلس على الكرسي",
    "сидит кошка на стуле",
    "समुद्र तट पर एक भूरा कुत्ता",
    "แมวดำนั่งบนเก้าอี้ในห้องนั่งเล่นที่บ้านของฉันในกรุงเทพมหานคร",
    "Un chien à la plage; il fait beau!",
]
BAD = {
    "caption_size": ["dog", "猫", "кот", "long " * 60],
    "placeholder": ["IMG_1234.jpg", "Image 00000005", "lorem ipsum dolor sit", "no image available",
                    "my-summer-photo.jpeg"],
    "incomplete": ["a dog on the beach with the", "the best of ...", "a table, chairs and",
                   "красная машина и …"],
    "code": ["<b>bold</b> letters", "see http://a.com/x for", "var x = 5; alert(1)",
             "fish &amp; chips", "a { color: red; }", "{{ product.name }} photo"],
    "boilerplate": ["Error 404 not found", "click here to enlarge it",
                    "Home | About | Contact | Blog", "加入购物车 免费送货", "Страница не найдена",
                    "الصفحة غير موجودة", "Seite nicht gefunden",
                    "ページが見つかりません", "All rights reserved 2019"],
    "offensive": ["free porn videos", "смотреть порно", "免费色情图片下载"],
    "gibberish": ["asdfghjklqwrtpzxc", "photo 3fa81c02be77aa", "FranÃ§ais cafÃ©"],
    "unreadable": ["12.03.2014 10x20 $5", "★★★★★ 5/5 ☆☆☆ ok", "(555) 123-4567 x 89"],
    "repetition": ["buy shoes buy boots buy hats buy", "哈哈哈哈哈哈哈", "sooooooooo nice cat"],
}  # fmt: skip


def batch(**columns) -> pa.RecordBatch:
    count = len(next(iter(columns.values())))
    arrays = [
        pa.array(columns.get(f.name, [None] * count), f.type) for f in SCHEMA if f.name != "source"
    ]
    return pa.RecordBatch.from_arrays(arrays, names=[n for n in SCHEMA.names if n != "source"])


def dropped(made, given: pa.RecordBatch) -> dict[str, list[bool]]:
    return {
        reason: [bool(x) for x in rule(given).fill_null(False).to_pylist()]
        for reason, _, rule in made
    }


@pytest.mark.parametrize("text", GOOD)
def test_good_captions_survive(text):
    found = dropped(captions.rules(STRICT), batch(caption=[text]))
    assert [reason for reason, (drop,) in found.items() if drop] == []


@pytest.mark.parametrize(("reason", "text"), [(r, t) for r, texts in BAD.items() for t in texts])
def test_bad_captions_are_dropped_for_their_reason(reason, text):
    assert dropped(captions.rules(STRICT), batch(caption=[text]))[reason] == [True]


def test_caption_rules_can_be_off_and_words_added():
    everything = [t for texts in BAD.values() for t in texts]
    assert dropped(captions.rules(Captions()), batch(caption=everything)) == {}
    more = Captions(offensive=True, offensive_words=("darn",))
    assert dropped(captions.rules(more), batch(caption=["darn it", "darning"])) == {
        "offensive": [True, False]
    }


@pytest.mark.parametrize(
    ("settings", "reason", "columns", "want"),
    [
        (dict(similarity=0.3), "similarity", dict(similarity=[0.29, 0.3, None]), [1, 0, 0]),
        (dict(watermark=0.9), "watermark", dict(pwatermark=[0.91, 0.9, None]), [1, 0, 0]),
        (dict(unsafe=0.9), "unsafe", dict(punsafe=[0.91, 0.9, None]), [1, 0, 0]),
        (dict(aesthetic=3.5), "aesthetic", dict(aesthetic=[3.4, 3.5, None]), [1, 0, 0]),
        (dict(side=64), "resolution",
         dict(width=[63, 64, None, None, 900], height=[900, 64, None, 63, None]), [1, 0, 0, 1, 0]),
        (dict(aspect=3.0), "aspect",
         dict(width=[301, 300, 100, None], height=[100, 100, 301, 1]), [1, 0, 1, 0]),
        (dict(least_chars=3, most_chars=5), "caption_length",
         dict(caption=["  ab  ", "abc", "黑色的", "猫", "abcdef", None]), [1, 0, 0, 1, 1, 0]),
    ],
)  # fmt: skip
def test_signals(settings, reason, columns, want):
    found = dropped(signals.rules(Signals(**settings)), batch(**columns))
    assert found == {reason: [bool(w) for w in want]}


def test_language(monkeypatch):
    given = batch(lang=["en", "ru", None, None], caption=["a", "b", "un cane", "??"])
    assert dropped(language.rules(Language(keep=("en", "it"))), given)["language"] == [
        False, True, False, False
    ]  # fmt: skip
    guess = {"un cane": "it", "??": "xx"}
    monkeypatch.setitem(
        language.IDENTIFIERS, "guess", lambda model: lambda c: [guess[x] for x in c]
    )
    made = language.rules(Language(keep=("en",), identifier="guess"))
    assert dropped(made, given)["language"] == [False, True, True, True]
    made = language.rules(Language(keep=("en",), identifier="cld"))
    with pytest.raises(ConfigError, match="identifier is 'cld': use fasttext, lingua"):
        dropped(made, given)


LONG = "a man in a red shirt rides his brown horse along the wide sandy beach at sunset"


def test_contamination(tmp_path):
    runs = decontaminate.word_runs(pa.array([LONG, "两只黑猫坐在红色椅子上", "a dog"]), 13, 8)[1]
    listed = decontaminate.Listed(np.array([5, 2**63], np.uint64), np.unique(runs))
    listed.save(tmp_path / "list.npz")
    settings = Contamination(list=str(tmp_path / "list.npz"), distance=2)
    given = batch(
        phash=[5, 5 ^ 3, 5 ^ 0x70, 2**63 + 1, None, 99],
        caption=[
            f"PHOTO: {LONG.upper()}!",
            " ".join(LONG.split()[2:15]),
            "两只黑猫坐在红色椅子上",
            "a dog",
            None,
            "",
        ],
    )
    assert dropped(decontaminate.rules(settings), given) == {
        "contaminated_picture": [True, True, False, True, False, False],
        "contaminated_caption": [True, True, True, False, False, False],
    }
    with pytest.raises(ConfigError, match=r"none\.npz cannot be read"):
        list(decontaminate.rules(Contamination(list=str(tmp_path / "none.npz"))))


def test_runs_of_words():
    rows, runs = decontaminate.word_runs(pa.array(["a b c d", "b c d", "a b", "a"]), 3, 2)
    assert rows.tolist() == [0, 0, 1, 2] and runs[1] == runs[2] and len({*runs.tolist()}) == 3


def config(**more) -> CleanConfig:
    return CleanConfig(
        stage=1, output="out", order=("cc3m",), sources={"cc3m": Source(("x",))}, **more
    )


def test_the_first_reason_counts(tmp_path):
    uids = np.array([(1, 2)], np.dtype("u8,u8"))
    np.save(tmp_path / "drop.npy", uids)
    made = rules.Rules(
        config(
            signals=Signals(similarity=0.3),
            captions=STRICT,
            drop_uids=(str(tmp_path / "drop.npy"),),
        ),
        "cc3m",
    )
    uid = [(7).to_bytes(8, "big") * 2] * 7 + [(1).to_bytes(8, "big") + (2).to_bytes(8, "big")]
    given = batch(
        uid=uid,
        url=["u", None, "", "u", "u", "u", "u", "u"],
        caption=[GOOD[0], GOOD[0], GOOD[0], "", None, "IMG_1234.jpg", GOOD[0], GOOD[0]],
        similarity=[None, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4, 0.4],
        status=["success", None, None, None, None, None, "failed", None],
    )
    found = [rules.REASONS[code] for code in made(given)]
    assert found == [
        *(
            "kept",
            "no_url",
            "no_url",
            "no_caption",
            "no_caption",
            "similarity",
            "download",
            "listed",
        )
    ]


def test_settings_are_checked():
    values = dataclasses.asdict(config())
    for change, message in [
        (dict(signal={}), "no setting 'signal': did you mean signals"),
        (dict(signals=dict(similarty=1)), "config.signals has no setting 'similarty'"),
        (dict(signals=dict(similarity="x")), "config.signals.similarity is 'x'"),
        (dict(order=("cc12m",)), "names 'cc12m', config.sources has cc3m"),
        (dict(duplicates=dict(keys=("md5",))), "has 'md5': use url"),
        (dict(duplicates=dict(distance=2)), "needs 'phash'"),
        (dict(sources=dict(cc3m=dict(files="x", captions=dict(leest=3)))), "'leest': did you mean"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(CleanConfig, {**values, **change})
