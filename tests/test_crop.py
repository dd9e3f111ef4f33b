"""The crop on the device is the host's crop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import image
from data_pipelines.benchmark.shards import photo
from internvl_jax.crop import crop_resize


@pytest.mark.parametrize(
    ("height", "width", "size"), [(120, 160, 224), (200, 170, 150), (256, 256, 50)]
)
def test_it_is_the_crop_of_the_host(height, width, size):
    """Enlarging and shrinking, with and without a mirror, against PIL."""
    arrays = [photo(np.random.default_rng(seed), height, width) for seed in range(4)]
    canvases, valid = zip(*(image.canvas(array, 256) for array in arrays))
    options = {"scale": (0.3, 1.0), "flip": 0.5}
    rngs = [np.random.default_rng(seed) for seed in range(4)]
    boxes = [image.crop_box(*v, rng, **options) for v, rng in zip(valid, rngs)]
    assert {box[4] for box in boxes} == {0.0, 1.0}
    crop = jax.jit(crop_resize, static_argnums=2)
    found = np.asarray(crop(np.stack(canvases), np.stack(boxes), size))
    rngs = [np.random.default_rng(seed) for seed in range(4)]
    exact = [
        image.random_resized_crop(array, size, rng, resample="exact", **options)
        for array, rng in zip(arrays, rngs)
    ]
    assert found.dtype == np.float32
    assert np.abs(found - np.stack(exact)).mean() <= 0.3
    assert (found == np.round(found)).all() and found.min() >= 0 and found.max() <= 255


def test_pixels_around_the_box_have_no_weight():
    canvas = np.full((1, 32, 32, 3), 255, np.uint8)
    canvas[:, 5:20, 7:25] = 40
    box = np.array([[5, 7, 15, 18, 0]], np.float32)
    for size in (4, 40):
        out = crop_resize(jnp.asarray(canvas), jnp.asarray(box), size)
        np.testing.assert_array_equal(out, 40.0)
