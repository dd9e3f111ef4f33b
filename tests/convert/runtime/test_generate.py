"""The runtime writes what we write: the same ids for greedy and beam search, left-padded too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.convert.case import Case
from internvl_jax.convert.formats import About
from internvl_jax.generate.choice import filter_logits
from internvl_jax.generate.decode import decode
from internvl_jax.generate.prompt import caption_start, chat_start, left_pad
from internvl_jax.generate.settings import Settings
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig

torch = pytest.importorskip("torch")

from internvl_jax.convert.runtime import generate as runtime  # noqa: E402
from tests.convert.runtime.conftest import (  # noqa: E402
    LLAMA,
    QLLAMA,
    QWEN,
    QWEN3,
    VIT,
    Pair,
    close,
    tensors,
    write,
)

SEARCHES = {
    "greedy": Settings(max_new_tokens=8),
    "greedy least": Settings(max_new_tokens=8, min_new_tokens=3, pad_id=7, bos_id=1),
    "beam 3": Settings(max_new_tokens=8, num_beams=3),
    "beam 5": Settings(max_new_tokens=8, num_beams=5, min_new_tokens=2, length_penalty=2.0),
    "beam never": Settings(max_new_tokens=8, num_beams=3, early_stopping="never", count_seed=True),
    "beam early": Settings(max_new_tokens=8, num_beams=3, early_stopping=True, length_penalty=-1.0),
    "one": Settings(max_new_tokens=1, num_beams=2),
}
RNG = np.random.default_rng(2)


def theirs(settings: Settings) -> runtime.Settings:
    return runtime.Settings(**dataclasses.asdict(settings))


def compare(ours: Any, start: Any, llm: Any, begun: runtime.Start, settings: Settings) -> None:
    expected = decode(ours, start, settings)
    found = runtime.Writer(llm)(begun, theirs(settings))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)


@pytest.fixture(scope="module")
def captions(exported: Callable) -> Any:
    """Five left-padded prompts about five pictures, read by both."""
    qllama = dataclasses.replace(QLLAMA, kv_heads=2, vocab_size=23)
    cfg = InternVLConfig(vision=VIT, qllama=qllama, queries=3, embed_dim=8, pool_heads=2)
    pair = exported(cfg, 0)
    images = RNG.normal(size=(5, 28, 28, 3)).astype(np.float32)
    rows = [[1, 5, 6, 9], [1, 4], [1, 9, 3, 3, 8, 7], [1], [1, 12, 3]]
    ids, mask = left_pad(rows)
    start = caption_start(pair.ours, images, ids, mask)
    model = pair.theirs()
    begun = model.read(torch.tensor(images), *runtime.left_pad(rows, 0))
    close(begun.logits, start.logits)
    return pair.ours.qllama, start, model.qllama, begun


@pytest.mark.parametrize("settings", SEARCHES.values(), ids=SEARCHES)
def test_captions(settings: Settings, captions: Any) -> None:
    compare(*captions, settings)


def test_searches_take_different_ways(captions: Any) -> None:
    """Else the comparison above would compare little."""
    _, _, llm, begun = captions
    found = [runtime.Writer(llm)(begun, theirs(s)) for s in SEARCHES.values()]
    assert len({str(f.ids.tolist()) for f in found}) >= 5
    ends = {int(n) < 8 for f in found[:-1] for n in f.lengths}
    assert ends == {True, False}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def chats(request: pytest.FixtureRequest, exported: Callable) -> Any:
    """Two conversations, one with two pictures and one with one, read by both."""
    llm = {"llama": LLAMA, "qwen2": QWEN, "qwen3": QWEN3}[request.param]
    cfg = ChatConfig(vision=VIT, llm=llm, projector="mlp1", select_layer=-4)
    pair, shown = exported(cfg, 3), [IMAGE_TOKEN] * 4
    images = RNG.normal(size=(2, 2, 28, 28, 3)).astype(np.float32)
    rows = [[1, *shown, 5, *shown, 6], [1, 7, *shown]]
    ids, mask = left_pad(rows)
    start = chat_start(pair.ours, images, ids, mask)
    model = pair.theirs()
    given = torch.tensor(images.reshape(4, 28, 28, 3)[:3])  # the fourth is an empty slot
    begun = model.read(given, *runtime.left_pad(rows, 0))
    close(begun.logits, start.logits)
    return pair.ours.llm, start, model.language_model, begun


@pytest.mark.parametrize("name", ["greedy", "beam 3"])
def test_chats(name: str, chats: Any) -> None:
    compare(*chats, SEARCHES[name])


def test_text_alone(exported: Callable) -> None:
    pair = exported(ChatConfig(vision=VIT, llm=QWEN), 4)
    ids, mask = left_pad([[1, 5, 6], [1, 4, 8]])
    start = chat_start(pair.ours, None, ids, mask)
    model = pair.theirs()
    begun = model.read(None, torch.tensor(ids), torch.tensor(mask))
    compare(pair.ours.llm, start, model.language_model, begun, SEARCHES["greedy"])


def test_left_padding_changes_nothing(captions: Any, exported: Callable) -> None:
    """A conversation answers alike alone and in a batch with longer ones."""
    pair = exported(LLAMA, 1)
    model, settings = pair.theirs(), runtime.Settings(max_new_tokens=6)
    rows = [[1, 5, 6, 9, 11], [1, 4], [1, 30, 31]]
    write = runtime.Writer(model)
    begin = lambda rows, **pad: runtime.start(
        model, *(lambda ids, mask: (model.embed(ids), mask))(*runtime.left_pad(rows, 0, **pad))
    )
    together = write(begin(rows), settings).ids
    for i, row in enumerate(rows):
        assert torch.equal(write(begin([row]), settings).ids[0], together[i])
        assert torch.equal(write(begin([row], multiple=16), settings).ids[0], together[i])


OLDER = "generation_transformers_4.32.0/"


@pytest.fixture(scope="module")
def official(packed: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The stored case of the official QLLaMA, as a folder of ours."""
    root = tmp_path_factory.mktemp("official")
    case = Case.read(packed.unpack("qllama_lm", root))
    cfg = case.architecture[0]
    model = case.model()
    folder = write(root / "exported", tensors(model, cfg), About(cfg))
    yield case, Pair(cfg, model, folder).theirs()


@pytest.mark.parametrize("prefix", ["", OLDER], ids=["4.37", "4.32"])
def test_every_stored_setting_of_the_official_model(official: Any, prefix: str) -> None:
    case, model = official
    ids, stored = case.config["qllama_config"], dict(case.outputs)
    pixels = torch.tensor(case.inputs["pixel_values"]).permute(0, 2, 3, 1)
    writer = runtime.Writer(model.qllama)
    assert len(case.config["generation"]) > 5
    for name, given in case.config["generation"].items():
        options = {k: v for k, v in given.items() if k in runtime.Settings.__annotations__}
        settings = runtime.Settings(
            eos_id=ids.get("eos_token_id", 2),
            pad_id=ids.get("pad_token_id", 0),
            bos_id=1,
            count_seed=prefix == OLDER,
            **options,
        )
        prompt = torch.tensor(case.inputs[given["input_ids"]]).long()
        mask = torch.tensor(case.inputs[given["attention_mask"]]) != 0
        chosen = given.get("images", list(range(len(prompt))))
        begun = model.read(pixels[chosen], prompt, mask)
        greedy = settings.num_beams == 1
        out = writer(begun, settings, logits=greedy)
        here = f"{prefix}gen.{name}."
        expected = {k.removeprefix(here): v for k, v in stored.items() if k.startswith(here)}
        rows = expected["sequences"]
        np.testing.assert_array_equal(out.ids[:, : rows.shape[1]], rows, err_msg=name)
        if "sequences_scores" in expected:
            scores = expected["sequences_scores"]
            np.testing.assert_allclose(out.scores, scores, atol=1e-4, err_msg=name)
        if "scores" in expected and out.logits is not None:
            scores = expected["scores"]
            np.testing.assert_allclose(out.logits[: len(scores)], scores, atol=1e-4, err_msg=name)


LOGITS = np.array([[0.1, -2.0, 1.5, 0.9, -0.4, 2.0, 0.0, 1.2, -1.0]], np.float32)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.6), (0.7, 4, 0.8), (1.0, 99, 1e-6)],
)
def test_samples_are_drawn_from_the_same_logits(
    temperature: float, top_k: int, top_p: float
) -> None:
    expected = filter_logits(jnp.asarray(LOGITS), temperature, top_k, top_p)
    settings = runtime.Settings(temperature=temperature, top_k=top_k, top_p=top_p)
    found = runtime.filter_logits(torch.tensor(LOGITS), settings)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-300])
def test_hardly_any_temperature_leaves_numbers(temperature: float) -> None:
    settings = runtime.Settings(do_sample=True, temperature=temperature, top_p=0.9)
    logits = torch.tensor([[1.0, 300.0, -2e4]])
    p = runtime.filter_logits(logits, settings).softmax(dim=-1)
    assert p.tolist() == [[0.0, 1.0, 0.0]]


def test_samples_follow_the_distribution(captions: Any) -> None:
    _, _, llm, begun = captions
    n = 4000
    rows = runtime.Start(
        begun.logits[:1].expand(n, -1) / 3,
        [(k[:1].expand(n, -1, -1, -1), v[:1].expand(n, -1, -1, -1)) for k, v in begun.slots],
        begun.mask[:1].expand(n, -1),
    )
    settings = runtime.Settings(max_new_tokens=1, do_sample=True, temperature=1.5, top_k=6)
    writer = runtime.Writer(llm)
    draw = lambda seed: writer(rows, settings, torch.Generator().manual_seed(seed)).ids[:, 0]
    p = runtime.filter_logits(rows.logits[:1], settings).softmax(-1)[0].numpy()
    counts = np.bincount(draw(0).numpy(), minlength=len(p))
    assert np.all(counts[p == 0] == 0) and np.sum(p > 0) == 6
    deviation = np.abs(counts / n - p) / np.sqrt(p * (1 - p) / n + 1e-12)
    assert np.all(deviation[p > 0] < 4)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_settings_are_ours() -> None:
    fields = lambda cls: [(f.name, f.default) for f in dataclasses.fields(cls)]
    assert fields(runtime.Settings) == fields(Settings)
    for wrong in ({"max_new_tokens": 0}, {"num_beams": 2, "do_sample": True}, {"top_p": 0.0}):
        with pytest.raises(ValueError) as ours:
            Settings(**wrong)
        with pytest.raises(ValueError) as found:
            runtime.Settings(**wrong)
        assert str(found.value) == str(ours.value)


def test_a_step_sees_no_memory_of_the_call_before(captions: Any) -> None:
    """Compiled, the cache is kept between calls (here without the compiler)."""
    _, _, llm, begun = captions
    writer = runtime.Writer(llm)
    writer.compiled = True
    for settings in (SEARCHES["greedy"], SEARCHES["beam 3"], SEARCHES["greedy"]):
        expected = runtime.Writer(llm)(begun, theirs(settings)).ids
        assert torch.equal(writer(begun, theirs(settings)).ids, expected)
    first = writer._kept
    writer(begun, theirs(SEARCHES["greedy least"]))
    assert first is not None and writer._kept is first
    assert first[0][0].shape[2] == runtime.Writer.ROOM
