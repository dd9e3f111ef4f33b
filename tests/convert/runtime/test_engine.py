"""From picture files and texts to vectors and words: the engine equals our own pipeline."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.image import decode, resize_pad, resize_square
from data_pipelines.text import Tokenizer
from internvl_jax.batch import SUMMARIZE
from internvl_jax.evaluate.embed import embed_images, embed_texts
from internvl_jax.generate.__main__ import converse, describe
from internvl_jax.generate.settings import Settings
from internvl_jax.models.intern_vit import normalize_images
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig

torch = pytest.importorskip("torch")

from internvl_jax.convert.runtime import Engine  # noqa: E402
from tests.convert.runtime.conftest import LLAMA, QLLAMA, QWEN, VIT, Pair, close  # noqa: E402

RNG = np.random.default_rng(4)


def png(height: int, width: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


FILES = [png(40, 30), png(28, 28), png(9, 60)]
TEXTS = ["a photo of a red cat", "dog", "eine Katze 猫 a a a a a a a a a a a a a", ""]
STAGE = {"image_size": 28, "text_length": 14}


@pytest.fixture(scope="module")
def retrieval(exported: Callable, tokenizer: Path) -> tuple[Pair, Engine]:
    size = Tokenizer(tokenizer).vocab_size
    qllama = dataclasses.replace(QLLAMA, vocab_size=size)
    cfg = InternVLConfig(vision=VIT, qllama=qllama, queries=3, embed_dim=8, pool_heads=2)
    pair = exported(cfg, stage=STAGE, data={"languages": ("en", "zh")}, tokenizer=tokenizer)
    return pair, Engine.load(pair.folder, device="cpu")


@pytest.fixture(scope="module")
def dialogue(exported: Callable, tokenizer: Path) -> tuple[Pair, Engine]:
    llm = dataclasses.replace(QWEN, vocab_size=Tokenizer(tokenizer).vocab_size)
    cfg = ChatConfig(vision=VIT, llm=llm, projector="mlp1", select_layer=-2)
    data = {"resize": "pad", "template": "vicuna_v1"}
    pair = exported(cfg, stage=STAGE, data=data, tokenizer=tokenizer)
    return pair, Engine.load(pair.folder, device="cpu")


def test_what_models_can_do(retrieval: Any, dialogue: Any, exported: Callable) -> None:
    engine = retrieval[1]
    assert engine.abilities == {"embed_image", "embed_text", "score", "caption"}
    assert (engine.name, engine.image_size, engine.max_text) == ("model", 28, 14)
    assert engine.prompt("zh") == "Chinese caption:"
    assert dialogue[1].abilities == {"chat"}
    with pytest.raises(ValueError, match="model cannot embed_text: it can chat"):
        dialogue[1].embed_text(["a"])
    with pytest.raises(ValueError, match="no prompt for the language 'fr': choose from en, zh"):
        engine.prompt("fr")
    with pytest.raises(ValueError, match="no mode 'X': choose from C, G, ITM"):
        engine.embed_image([], "X")
    tower = Engine.load(exported(VIT).folder, device="cpu")
    assert tower.abilities == {"embed_image"}
    vector = tower.embed_image([tower.decode_image(FILES[0])])
    assert vector.shape == (1, 24) and np.linalg.norm(vector) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["C", "G"])
def test_vectors_and_scores(mode: str, retrieval: Any, tokenizer: Path) -> None:
    pair, engine = retrieval
    pictures = [engine.decode_image(data) for data in FILES]
    pixels = np.stack([resize_square(decode(data), 28, "exact") for data in FILES])
    ids, mask = Tokenizer(tokenizer).encode_batch([SUMMARIZE + t for t in TEXTS], 14)
    image, text = embed_images(pair.ours, pixels, mode), embed_texts(pair.ours, ids, mask)
    found = engine.embed_image(pictures, mode)
    close(found, image)
    close(engine.embed_text(TEXTS), text)
    assert found.dtype == np.float32
    scale = np.exp(float(pair.ours.logit_scale[...]))
    close(engine.score(pictures, TEXTS, mode), scale * image @ text.T)
    engine.ROWS = 2  # in parts, the same
    close(engine.embed_image(pictures, mode), image)
    close(engine.embed_text(TEXTS), text)
    del engine.ROWS
    assert engine.embed_text([]).shape == (0, 8)


def test_matching(retrieval: Any, tokenizer: Path) -> None:
    pair, engine = retrieval
    pixels = np.stack([resize_square(decode(data), 28, "exact") for data in FILES])
    ids, mask = Tokenizer(tokenizer).encode_batch(TEXTS, 14)

    @jax.jit
    def probability(pixels: Any, ids: Any, mask: Any) -> jax.Array:
        vision = pair.ours.image_tokens(normalize_images(pixels))
        return jax.nn.softmax(pair.ours.matching_score(vision, ids, mask))[:, 1]

    expected = [probability(p[None], ids, mask) for p in pixels]
    found = engine.score([engine.decode_image(data) for data in FILES], TEXTS, "ITM")
    close(found, np.stack(expected))


@pytest.mark.parametrize("beams", [1, 3])
def test_captions(beams: int, retrieval: Any, tokenizer: Path) -> None:
    pair, engine = retrieval
    pixels = np.stack([resize_square(decode(data), 28, "exact") for data in FILES])
    settings = Settings(max_new_tokens=10, num_beams=beams)
    how = engine.settings(max_new_tokens=10, num_beams=beams)
    key, prompts = jax.random.key(0), ["English caption:", "a"]
    pictures = [engine.decode_image(data) for data in FILES[:2]]
    found = engine.caption(pictures, prompts, how)
    for i, prompt in enumerate(prompts):
        expected = describe(
            pair.ours, Tokenizer(tokenizer), pixels[i : i + 1], prompt, settings, key
        )
        assert [found[i]] == expected
    assert len(set(found)) > 1
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        engine.caption(pictures, ["a"], how)


def test_a_conversation(dialogue: Any, tokenizer: Path) -> None:
    """Three turns about two pictures, beside another conversation in the same batch."""
    pair, engine = dialogue
    pixels = np.stack([resize_pad(decode(data), 28, "exact") for data in FILES[:2]])
    questions = ["what is this", "is a cat red ?", "what"]
    settings = Settings(max_new_tokens=9)
    expected = dict(
        converse(pair.ours, Tokenizer(tokenizer), pixels, questions, settings, jax.random.key(0))
    )
    how = engine.settings(max_new_tokens=9)
    pictures = [engine.decode_image(data) for data in FILES]
    other = [{"from": "human", "value": "<image>\na cat"}]
    turns: list[dict] = []
    alone = engine.chat([pictures[2:]], [other], how)
    for question in questions:
        shown = "<image>\n<image>\n" if not turns else ""
        turns.append({"from": "human", "value": shown + question})
        reply, beside = engine.chat([pictures[:2], pictures[2:]], [turns, other], how)
        turns.append({"from": "gpt", "value": reply.text})
        assert reply.text == expected[question]
        assert beside == alone[0]
        assert (reply.finish == "length") == (reply.new_tokens == 9) or reply.finish == "stop"
    assert reply.prompt_tokens > 2 * pair.cfg.visual_tokens(28)


def test_a_conversation_that_cannot_be(dialogue: Any) -> None:
    engine = dialogue[1]
    shown = engine.decode_image(FILES[0])
    ask = lambda text: [{"from": "human", "value": text}]
    for pictures, turns, said in (
        ([[shown]], [ask("a")], "1 pictures but 0 times <image>"),
        ([[]], [ask("<image> a")], "0 pictures but 1 times <image>"),
        ([[]], [[*ask("a"), {"from": "gpt", "value": "b"}]], "end with a question"),
        ([], [ask("a")], "1 conversations and 0 lists"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.chat(pictures, turns, engine.settings())
    assert engine.chat([], [], engine.settings()) == []
    assert len(engine.chat([[]], [ask("a")], engine.settings(max_new_tokens=2))) == 1


def test_replies_end(dialogue: Any) -> None:
    """`finish` and the count of tokens, for an end that comes and one that does not."""
    engine = dialogue[1]
    turns = [[{"from": "human", "value": "a cat"}]]
    long = engine.chat([[]], turns, engine.settings(max_new_tokens=4, min_new_tokens=4))[0]
    assert long.new_tokens == 4
    llm = engine.model.language_model
    head = llm.lm_head.weight.data.clone()
    llm.lm_head.weight.data.mul_(0)  # all logits equal: the first id; now make it EOS
    llm.lm_head.weight.data[2] = 1000 * llm.model["norm"].weight.sign()
    hidden_sign = engine.chat([[]], turns, engine.settings(max_new_tokens=4))[0]
    llm.lm_head.weight.data.neg_()
    other = engine.chat([[]], turns, engine.settings(max_new_tokens=4))[0]
    llm.lm_head.weight.data.copy_(head)
    assert {(r.finish, r.new_tokens) for r in (hidden_sign, other)} >= {("stop", 1)}


def test_a_language_model_alone(exported: Callable, tokenizer: Path) -> None:
    llm = dataclasses.replace(LLAMA, vocab_size=Tokenizer(tokenizer).vocab_size)
    engine = Engine.load(exported(llm, tokenizer=tokenizer).folder, device="cpu")
    how = engine.settings(max_new_tokens=3)
    assert engine.chat([[]], [[{"from": "human", "value": "a"}]], how)[0].new_tokens <= 3
    with pytest.raises(ValueError, match="sees no pictures"):
        engine.decode_image(FILES[0])


def test_samples_repeat_by_seed(dialogue: Any) -> None:
    engine = dialogue[1]
    how = engine.settings(max_new_tokens=8, do_sample=True)
    turns = [[{"from": "human", "value": "a cat"}]]

    def draw(seed: int) -> str:
        engine.random.manual_seed(seed)
        return engine.chat([[]], turns, how)[0].text

    assert draw(0) == draw(0) != draw(1)
