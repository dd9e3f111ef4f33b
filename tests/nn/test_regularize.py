"""Drop path and token masking: what is kept, how much, and from which key it is drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.nn.regularize import drop_path, keep_tokens

KEY = jax.random.key(3)


def test_drop_path_drops_whole_examples_at_its_rate():
    x = jnp.ones((4000, 2, 3))
    y = np.asarray(drop_path(x, jnp.float32(0.2), KEY, jnp.arange(4000)))
    assert set(np.unique(y)) == {0.0, np.float32(1.25)}
    assert np.all(y == y[:, :1, :1])
    # Three standard deviations of a mean of 4,000 draws.
    assert abs((y[:, 0, 0] == 0).mean() - 0.2) < 3 * np.sqrt(0.16 / 4000)


def test_rate_zero_keeps_everything():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    np.testing.assert_array_equal(drop_path(x, jnp.float32(0), KEY, jnp.arange(5)), x)


def test_draws_belong_to_the_example_not_to_its_place():
    x = jnp.ones((64, 1))
    whole = drop_path(x, jnp.float32(0.5), KEY, jnp.arange(64))
    part = drop_path(x[:20], jnp.float32(0.5), KEY, jnp.arange(64)[10:30])
    np.testing.assert_array_equal(part, whole[10:30])
    other = drop_path(x, jnp.float32(0.5), jax.random.fold_in(KEY, 1), jnp.arange(64))
    assert np.any(other != whole)


def test_kept_tokens_are_distinct_and_differ_between_examples():
    x = jnp.broadcast_to(jnp.arange(36.0)[None, :, None], (8, 36, 1))
    kept = np.asarray(keep_tokens(x, 18, KEY, jnp.arange(8)))[..., 0]
    assert kept.shape == (8, 18)
    assert all(len(set(row)) == 18 for row in kept)
    assert len({tuple(sorted(row)) for row in kept}) == 8
    again = np.asarray(keep_tokens(x[3:5], 18, KEY, jnp.asarray([3, 4])))[..., 0]
    np.testing.assert_array_equal(again, kept[3:5])


def test_every_token_is_kept_equally_often():
    x = jnp.broadcast_to(jnp.arange(8.0)[None, :, None], (2000, 8, 1))
    kept = np.asarray(keep_tokens(x, 2, KEY, jnp.arange(2000)))
    share = np.bincount(kept.astype(int).ravel(), minlength=8) / 2000
    assert np.all(np.abs(share - 0.25) < 4 * np.sqrt(0.1875 / 2000))


@pytest.mark.parametrize("keep", [0, 9])
def test_an_impossible_number_is_refused(keep):
    with pytest.raises(ValueError, match=f"Cannot keep {keep} of 8 tokens"):
        keep_tokens(jnp.zeros((1, 8, 1)), keep, KEY, jnp.arange(1))
