"""Patches, and position tables at other sizes: numbers that torch's bicubic interpolation gave.

`torch_bicubic.npz`: three channels of a 4 x 4 table and what the released code made of it at
2 x 2, 7 x 7, 6 x 6 and 6 x 3 patches.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.nn.embed import PatchEmbed, bicubic_matrix, resize_positions
from internvl_jax.nn.param import normal

STORED = np.load(Path(__file__).with_name("torch_bicubic.npz"))
GRIDS = {"down": (2, 2), "odd": (7, 7), "up": (6, 6), "nonsquare": (6, 3)}


@pytest.mark.parametrize("name", GRIDS)
def test_position_tables_equal_torch(name):
    resized = resize_positions(jnp.asarray(STORED["table"]), GRIDS[name])
    np.testing.assert_allclose(resized, STORED[name], atol=2e-6)


def test_the_same_grid_is_the_same_table():
    table = jnp.asarray(STORED["table"])
    assert resize_positions(table, (4, 4)) is table


@pytest.mark.parametrize(("source", "target"), [(16, 14), (16, 26), (4, 4), (5, 3), (3, 20)])
def test_bicubic_weights_sum_to_one(source, target):
    matrix = bicubic_matrix(source, target)
    assert matrix.shape == (target, source)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    if source == target:
        np.testing.assert_array_equal(matrix, np.eye(source))


@pytest.mark.parametrize(("source", "target"), [((4, 4), (6, 3)), ((16, 16), (14, 26))])
def test_bicubic_equals_torch_itself(source, target):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(1, 2, *source)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(image), size=target, mode="bicubic", align_corners=False
    ).numpy()
    rows, columns = (bicubic_matrix(s, t) for s, t in zip(source, target, strict=True))
    np.testing.assert_allclose(rows @ image @ columns.T, expected, atol=6e-6)


def test_a_table_without_a_square_grid_is_refused():
    with pytest.raises(ValueError, match="13 rows is not CLS plus a square grid"):
        resize_positions(jnp.zeros((13, 2)), (2, 2))


def test_patches_are_a_strided_convolution(drawn):
    embed = drawn(lambda rngs: PatchEmbed(2, 3, rngs=rngs, init=normal(1)))
    image = np.random.default_rng(1).normal(size=(1, 4, 6, 3)).astype(np.float32)
    y = np.asarray(embed(jnp.asarray(image)))
    kernel, bias = np.asarray(embed.kernel[...]), np.asarray(embed.bias[...])
    assert y.shape == (1, 6, 3)
    for row in range(2):
        for column in range(3):
            patch = image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = np.einsum("pqc,pqcd->d", patch, kernel) + bias
            np.testing.assert_allclose(y[0, row * 3 + column], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5, 4, 3), (1, 4, 5, 3), (1, 4, 4, 1)])
def test_images_that_do_not_split_are_refused(shape):
    embed = PatchEmbed(2, 3, rngs=nnx.Rngs(0), init=normal(1))
    with pytest.raises(ValueError, match="do not split into 2x2 RGB patches: resize them"):
        embed(jnp.zeros(shape))
