"""New tokens start as the mean of the old ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from internvl_jax.convert.vocabulary import grown


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_new_entries_are_the_mean_and_old_ones_stay(dtype, axis: int) -> None:
    table = np.random.default_rng(0).normal(3, 1, (5, 7)).astype(dtype)
    out = grown(table, 9, axis)
    old = table.shape[axis]
    assert out.dtype == table.dtype and out.shape[axis] == 9
    kept, new = np.split(out, [old], axis=axis)
    np.testing.assert_array_equal(kept, table)
    mean = np.repeat(table.astype(np.float64).mean(axis, keepdims=True), 9 - old, axis=axis)
    half_a_digit = float(ml_dtypes.finfo(dtype).eps) / 2
    np.testing.assert_allclose(new.astype(np.float64), mean, rtol=1.01 * half_a_digit)


def test_many_half_precision_rows_neither_overflow_nor_drown() -> None:
    # The sum is beyond float16, and from 65536 on adding one changes nothing in bfloat16.
    for dtype in (np.float16, ml_dtypes.bfloat16):
        table = np.ones((100_000, 1), dtype)
        assert float(grown(table, 100_001, 0)[-1, 0]) == 1.0


def test_the_mean_of_many_rows_is_exact_to_float32() -> None:
    table = np.random.default_rng(0).normal(1, 1, (150_000, 2)).astype(np.float32)
    np.testing.assert_allclose(
        grown(table, 150_001, 0)[-1], table.astype(np.float64).mean(0), rtol=1e-7
    )


def test_nothing_new_changes_nothing() -> None:
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(grown(table, 3, 0), table)


@pytest.mark.parametrize("shape, rows", [((5, 2), 4), ((0, 2), 3), ((5, 2), -1)])
def test_what_cannot_grow_is_a_sentence(shape: tuple[int, int], rows: int) -> None:
    with pytest.raises(ValueError, match=f"{shape[0]} entries cannot grow to {rows}"):
        grown(np.zeros(shape, np.float32), rows, 0)
