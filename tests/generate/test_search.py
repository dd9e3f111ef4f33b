"""Beam search against its walk in plain Python, sampling against its distribution."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.generate import beam
from internvl_jax.generate.cache import Start, started
from internvl_jax.generate.choice import filter_logits
from internvl_jax.generate.decode import _decode, decode
from internvl_jax.generate.settings import Settings
from internvl_jax.models.llama import Llama
from internvl_jax.models.qllama import causal_mask

EOS, PAD = 2, 0
B, P, T = 10, 3, 6
PROMPTS = np.random.default_rng(0).integers(3, 9, (B, P), np.int32)
NEVER = -1


@pytest.fixture(scope="module")
def start(decoder: Llama) -> Start:
    mask = jnp.ones((B, P), bool)

    @jax.jit
    def read(ids):
        positions = jnp.broadcast_to(jnp.arange(P), (B, P))
        return started(decoder, decoder(decoder.embed(ids), positions, causal_mask(mask)), mask)

    return read(PROMPTS)


@pytest.fixture(scope="module")
def log_p(decoder: Llama):
    """ids [R, <= P + T] -> float64 log-probabilities [R, V] of the next token, no cache."""

    @jax.jit
    def all_positions(ids):
        positions = jnp.broadcast_to(jnp.arange(P + T), ids.shape)
        hidden = decoder(decoder.embed(ids), positions, causal_mask(jnp.ones(ids.shape, bool)))
        return jax.nn.log_softmax(decoder.logits(hidden.hidden))

    known: dict[tuple[int, ...], np.ndarray] = {}

    def call(rows: list[tuple[int, ...]]) -> list[np.ndarray]:
        new = sorted(set(rows) - known.keys())
        for at in range(0, len(new), 64):
            part = new[at : at + 64]
            ids = np.zeros((64, P + T), np.int32)
            for i, row in enumerate(part):
                ids[i, : len(row)] = row
            out = np.asarray(all_positions(ids), np.float64)
            known.update({row: out[i, len(row) - 1] for i, row in enumerate(part)})
        return [known[row] for row in rows]

    return call


def walk(log_p, prompt: tuple[int, ...], s: Settings) -> tuple[list[int], float]:
    """One example, candidate by candidate."""
    K = s.num_beams
    beams = [(0.0 if k == 0 else -1e9, ()) for k in range(K)]
    closed: list[tuple[float, tuple[int, ...]]] = []
    done = False

    def close(total, ids, length):
        score = total / length**s.length_penalty
        if len(closed) < K or score > min(closed)[0]:
            closed.append((score, ids))
            if len(closed) > K:
                closed.remove(min(closed))

    for t in range(s.max_new_tokens):
        candidates = []
        for (total, ids), p in zip(beams, log_p([prompt + ids for _, ids in beams])):
            candidates += [
                (total + (-np.inf if v == EOS and t < s.min_new_tokens else p[v]), ids, v)
                for v in range(len(p))
            ]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * K]
        beams = []
        for rank, (total, ids, v) in enumerate(candidates):
            if v != EOS:
                beams.append((total, (*ids, v)))
            elif rank < K:
                close(total, (*ids, v), t + 1)
            if len(beams) == K:
                break
        if len(closed) == K:
            length = t + 1
            if s.early_stopping == "never" and s.length_penalty > 0:
                length = s.max_new_tokens + s.count_seed
            best = candidates[0][0] / length**s.length_penalty
            done = s.early_stopping is True or min(closed)[0] >= best
        if done:
            break
    if not done:
        for total, ids in beams:
            close(total, ids, s.max_new_tokens + s.count_seed)
    score, ids = max(closed)
    return list(ids), score


@pytest.mark.parametrize("early", [False, True, "never"])
def test_beam_search_equals_the_walk(decoder: Llama, start: Start, log_p, early: bool | str):
    ended, options = set(), [(1.0, 0, False), (0.0, 2, False), (-1.0, 0, True), (2.5, 1, True)]
    for penalty, least, count_seed in options:
        settings = Settings(
            max_new_tokens=T,
            min_new_tokens=least,
            num_beams=3,
            length_penalty=penalty,
            early_stopping=early,
            count_seed=count_seed,
        )
        out = decode(decoder, start, settings)
        for b in range(B):
            ids, score = walk(log_p, tuple(map(int, PROMPTS[b])), settings)
            assert list(out.ids[b, : out.lengths[b]]) == ids
            assert np.all(out.ids[b, out.lengths[b] :] == PAD)
            np.testing.assert_allclose(out.scores[b], score, rtol=1e-4)
            ended.add("closed" if ids[-1] == EOS else "open")
    assert ended == {"closed", "open"}


def test_one_beam_equals_greedy(decoder: Llama, start: Start):
    settings = Settings(max_new_tokens=T, min_new_tokens=1, length_penalty=0.5)
    greedy = decode(decoder, start, settings)
    ids, lengths, scores = jax.jit(lambda start: beam.search(decoder, start, settings))(start)
    np.testing.assert_array_equal(greedy.ids, ids)
    np.testing.assert_array_equal(greedy.lengths, lengths)
    np.testing.assert_allclose(greedy.scores, scores, rtol=1e-5)
    assert len(set(map(int, lengths))) > 1


def test_greedy_takes_the_best_and_pads(decoder: Llama, start: Start, log_p):
    out = decode(decoder, start, Settings(max_new_tokens=T, pad_id=7))
    for b in range(B):
        row = tuple(map(int, PROMPTS[b]))
        total, n = 0.0, int(out.lengths[b])
        for token in map(int, out.ids[b, :n]):
            p = log_p([row])[0]
            assert token == int(np.argmax(p))
            row, total = (*row, token), total + p[token]
        assert (row[-1] == EOS) == (n < T) or n == T
        assert np.all(out.ids[b, n:] == 7)
        np.testing.assert_allclose(out.scores[b], total / n, rtol=1e-4)


def test_another_temperature_or_penalty_compiles_nothing(decoder: Llama, start: Start):
    key = jax.random.key(0)
    sample = Settings(max_new_tokens=T, do_sample=True, temperature=0.5, top_k=4, top_p=0.9)
    beams = Settings(max_new_tokens=T, num_beams=3)
    for settings in (sample, beams):
        decode(decoder, start, settings, key)
    before = _decode._cache_size()
    other = {"temperature": 2.0, "top_k": 2, "top_p": 0.7, "eos_id": 5}
    longer = {"length_penalty": 3.0, "min_new_tokens": 2, "pad_id": 8, "count_seed": True}
    for settings in (dataclasses.replace(sample, **other), dataclasses.replace(beams, **longer)):
        decode(decoder, start, settings, key)
    assert _decode._cache_size() == before


def single(llm: Llama, logits: np.ndarray, rows: int) -> Start:
    """A prompt of one blank token with chosen logits."""
    cfg = llm.cfg
    kv = jnp.zeros((cfg.depth, rows, 1, cfg.K, cfg.H))
    tiled = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    return Start(tiled, (kv, kv), jnp.ones((rows, 1), bool))


LOGITS = np.array([0.1, -2.0, 1.5, 0.9, -0.4, 2.0, 0.0, 1.2, -1.0])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (0.7, 4, 0.8), (1.0, 99, 1e-6)],
)
def test_filter_logits(temperature: float, top_k: int, top_p: float):
    x = LOGITS / temperature
    order = np.argsort(-x)
    kept = order[: top_k or None]
    p = np.exp(x[kept]) / np.exp(x[kept]).sum()
    kept = kept[: 1 + int(np.sum(np.cumsum(p)[:-1] < top_p))]
    logits = jnp.asarray(LOGITS[None], jnp.float32)
    got = np.asarray(filter_logits(logits, temperature, top_k, top_p))
    assert set(np.flatnonzero(np.isfinite(got[0]))) == set(kept)
    np.testing.assert_allclose(got[0, kept], x[kept], rtol=1e-6)


def test_samples_follow_the_distribution(decoder: Llama):
    n = 4000
    settings = Settings(
        max_new_tokens=1, min_new_tokens=1, do_sample=True, temperature=1.5, top_k=6, eos_id=EOS
    )
    out = decode(decoder, single(decoder, LOGITS, n), settings, jax.random.key(5))
    x = LOGITS / 1.5
    x[EOS] = -np.inf
    x[np.argsort(-x)[6:]] = -np.inf
    p = np.exp(x) / np.exp(x).sum()
    counts = np.bincount(np.asarray(out.ids[:, 0]), minlength=len(p))
    assert np.all(counts[p == 0] == 0)
    deviation = np.abs(counts / n - p) / np.sqrt(p * (1 - p) / n + 1e-12)
    assert np.all(deviation[p > 0] < 4)


def test_sampling_is_keyed_by_row_and_step(decoder: Llama, start: Start):
    settings = Settings(max_new_tokens=T, do_sample=True, eos_id=NEVER)
    a, b = (decode(decoder, start, settings, jax.random.key(k)).ids for k in (0, 1))
    np.testing.assert_array_equal(a, decode(decoder, start, settings, jax.random.key(0)).ids)
    assert np.any(np.asarray(a) != np.asarray(b))
    half = jax.tree.map(lambda x: x[:, :5], start.kv)
    fewer = decode(
        decoder, Start(start.logits[:5], half, start.mask[:5]), settings, jax.random.key(0)
    )
    np.testing.assert_array_equal(fewer.ids, a[:5])
    greedy = decode(decoder, start, Settings(max_new_tokens=T, eos_id=NEVER))
    one = Settings(max_new_tokens=T, do_sample=True, eos_id=NEVER, top_k=1)
    np.testing.assert_array_equal(decode(decoder, start, one, jax.random.key(0)).ids, greedy.ids)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 3, "min_new_tokens": 4},
        {"num_beams": 0},
        {"early_stopping": "soon"},
        {"do_sample": True, "num_beams": 2},
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_p": 0.0},
    ],
)
def test_settings_that_cannot_be(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_misuse_is_a_sentence(decoder: Llama, start: Start):
    with pytest.raises(ValueError, match="pass key="):
        decode(decoder, start, Settings(do_sample=True))
    with pytest.raises(ValueError, match="num_beams=1"):
        decode(decoder, start, Settings(num_beams=2), logits=True)
