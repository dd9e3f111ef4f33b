"""InternViT's options: other image sizes, drop path, token masking, taps, padded heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.batch import MEAN, STD
from internvl_jax.models import intern_vit
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import InternViT, Randomness, VitConfig, normalize_images
from internvl_jax.nn.embed import resize_positions

EXACT = Compute(dtype="float32", remat="none")
CFG = VitConfig(image_size=32, patch_size=8, width=20, depth=3, heads=5, mlp_dim=24)
RANDOM = Randomness(jax.random.key(0), jnp.arange(4))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)


def make(drawn, compute=EXACT, **changes):
    cfg = dataclasses.replace(CFG, **changes)
    return drawn(lambda rngs: InternViT(cfg, compute, rngs=rngs))


@pytest.fixture(scope="module")
def plain(drawn):
    return make(drawn)


@pytest.mark.parametrize(
    "options",
    [
        dict(norm="rms", qk_norm=True, qkv_bias=False),
        dict(norm="layer", qk_norm=False, qkv_bias=True),
        dict(norm="rms", qk_norm=True, qkv_bias=True, eps=1e-2),
    ],
)
def test_every_parameter_matters(drawn, images, options):
    """An option that builds a parameter also uses it, and eps is not a constant."""
    model = make(drawn, **options)

    graphdef, state = nnx.split(model)

    def loss(state):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(images).tokens))

    grads = jax.jit(jax.grad(loss))(state)
    for path, leaf in nnx.to_flat_state(grads):
        assert float(jnp.abs(leaf.get_value()).max()) > 1e-4, "/".join(map(str, path))


def test_eps_is_the_configs(drawn, images):
    a, b = (make(drawn, eps=e)(images).tokens for e in (1e-6, 1e-1))
    assert float(jnp.abs(a - b).max()) > 1e-4


@pytest.mark.parametrize(("height", "width"), [(24, 24), (48, 16)])
def test_other_sizes_interpolate_the_table(plain, height, width):
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(1, height, width, 3)), jnp.float32)
    patches = plain.patch(images)
    table = resize_positions(plain.pos[...], (height // 8, width // 8))
    expected = jnp.concatenate([plain.cls[...][None, None], patches], axis=1) + table
    np.testing.assert_allclose(plain.embed(images), expected, atol=1e-5)
    assert plain(images).tokens.shape == (1, 1 + height * width // 64, 20)


def test_taps_and_hidden_are_the_layers_outputs(plain, images):
    out = plain(images, taps=(0, -1), hidden=True)
    assert out.hidden.shape == (3, 4, 17, 20)
    np.testing.assert_array_equal(out.hidden[-1], out.tokens)
    np.testing.assert_array_equal(out.taps[0], out.hidden[0])
    np.testing.assert_array_equal(out.taps[1], out.tokens)


def test_padded_heads_give_the_same_tokens(drawn, plain, images):
    padded = make(drawn, compute=dataclasses.replace(EXACT, head_multiple=4))
    assert padded.blocks.layers.attn.qkv.shape == (3, 20, 3, 5, 4)
    np.testing.assert_allclose(padded(images).tokens, plain(images).tokens, atol=1e-4)


def test_drop_path_rates():
    uniform = VitConfig(drop_path=0.2, drop_path_mode="uniform").drop_path_rates()
    linear = VitConfig(drop_path=0.3, drop_path_mode="linear").drop_path_rates()
    np.testing.assert_allclose(uniform, np.full(48, 0.2), rtol=1e-6)
    np.testing.assert_allclose(linear, np.arange(48) * 0.3 / 47, rtol=1e-6)


@pytest.mark.parametrize("mode", ["uniform", "linear"])
def test_each_layer_drops_at_its_rate(drawn, mode):
    """Two branches of an example are dropped on their own, each with its layer's probability."""
    n = 3000
    model = make(drawn, drop_path=0.4, drop_path_mode=mode, width=4, heads=2, mlp_dim=4)
    images = jnp.zeros((n, 8, 8, 3))
    random = Randomness(jax.random.key(5), jnp.arange(n))
    hidden = np.asarray(model(images, random=random, hidden=True).hidden)
    before = np.asarray(model.embed(images))
    for layer, rate in enumerate(model.cfg.drop_path_rates()):
        unchanged = np.all(hidden[layer] == before, axis=(1, 2)).mean()
        assert abs(unchanged - rate**2) < 4 * np.sqrt(max(rate**2, 1e-9) / n) + 1e-9
        before = hidden[layer]


def test_drop_path_preserves_the_expectation(drawn):
    n = 4000
    model = make(drawn, depth=1, drop_path=0.3, width=4, heads=2, mlp_dim=4)
    image = jnp.asarray(np.random.default_rng(2).normal(size=(1, 8, 8, 3)), jnp.float32)
    random = Randomness(jax.random.key(6), jnp.arange(n))
    x = model.embed(image)
    block = model.blocks.layer(0)
    attn = block.attn(block.norm1(x), gain=block.ls1[...])
    first = np.asarray(intern_vit._dropped(jnp.repeat(attn, n, 0), jnp.float32(0.3), random, 0))
    deviation = first.std(0) / np.sqrt(n)
    assert np.all(np.abs(first.mean(0) - np.asarray(attn[0])) < 4.5 * deviation + 1e-6)


def test_no_randomness_means_no_dropping(drawn, images):
    a = make(drawn, drop_path=0.9)(images).tokens
    np.testing.assert_array_equal(a, make(drawn)(images).tokens)


def test_masked_tokens_are_really_gone(plain, images, monkeypatch):
    """Blocks see CLS and the kept tokens only, and CLS comes first with its own position."""
    seen = []
    call = intern_vit.Block.__call__

    def spy(self, x, *rest):
        seen.append(x.shape)
        return call(self, x, *rest)

    monkeypatch.setattr(intern_vit.Block, "__call__", spy)
    out = plain(images, keep=6, random=RANDOM)
    assert set(seen) == {(4, 7, 20)}
    assert out.tokens.shape == (4, 7, 20)


def test_which_tokens_stay(drawn, images):
    """With blocks that add nothing, what comes out is what went in."""
    model = make(drawn)
    for scale in (model.blocks.layers.ls1, model.blocks.layers.ls2):
        scale[...] = jnp.zeros_like(scale[...])
    embedded = np.asarray(model.embed(images))
    out = np.asarray(model(images, keep=8, random=RANDOM).tokens)
    chosen = []
    for b in range(4):
        np.testing.assert_array_equal(out[b, 0], embedded[b, 0])
        places = [int(np.flatnonzero((embedded[b] == row).all(1))[0]) for row in out[b, 1:]]
        assert len(set(places)) == 8 and 0 not in places
        chosen.append(tuple(sorted(places)))
    assert len(set(chosen)) == 4


def test_randomness_follows_the_example(drawn, images):
    """A microbatch draws what the whole batch drew: gradient caching and other hosts agree."""
    model = make(drawn, drop_path=0.5)
    whole = model(images, keep=8, random=RANDOM).tokens
    some = jnp.asarray([1, 3])
    part = model(images[some], keep=8, random=Randomness(RANDOM.key, some)).tokens
    np.testing.assert_allclose(part, whole[some], atol=1e-5)
    other = model(images, keep=8, random=Randomness(jax.random.key(9), RANDOM.example)).tokens
    assert not np.allclose(other, whole, atol=1e-2)


def test_masking_without_randomness_is_refused(plain, images):
    with pytest.raises(ValueError, match="needs randomness: pass `random`"):
        plain(images, keep=6)


def test_images_are_normalised_with_imagenets_statistics():
    image = np.random.default_rng(3).integers(0, 256, (2, 4, 4, 3), np.uint8)
    expected = (image / 255 - np.asarray(MEAN)) / np.asarray(STD)
    np.testing.assert_allclose(normalize_images(image), expected, atol=1e-5)
    np.testing.assert_allclose(normalize_images(jnp.asarray(image)), expected, atol=1e-5)


def test_deep_blocks_start_smaller():
    """BEiT's initialisation: the output projections of block l shrink by sqrt(2 l)."""
    # 0.02 at the width of 3,200, cut off at two standard deviations.
    spread_of_init = 0.02 * (3200 / 80) ** 0.5 * 0.8796
    cfg = dataclasses.replace(CFG, width=80, mlp_dim=400)
    layers = InternViT(cfg, EXACT, rngs=nnx.Rngs(0)).blocks.layers
    for kernel in (layers.attn.out[...], layers.mlp.fc2[...]):
        spread = np.asarray(kernel).reshape(3, -1).std(1)
        np.testing.assert_allclose(spread, spread_of_init / np.sqrt([2, 4, 6]), rtol=0.05)
    np.testing.assert_allclose(np.asarray(layers.mlp.fc1[...]).std(), spread_of_init, rtol=0.05)
