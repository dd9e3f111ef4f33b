"""The counterparts compute the same function, and the benchmarks run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.definition import Definition
from internvl_jax.tree import flatten

torch = pytest.importorskip("torch")


def test_compact_torch_is_the_same_function():
    from tests.benchmarks.sides import demo_stage, random_batch
    from tests.benchmarks.torch_clip import TorchClip

    stage = demo_stage(1 / 3)
    definition = Definition.of(stage.build, stage.trainable)
    params = definition.fresh(0)
    batch = random_batch(stage, 8)
    key = jax.random.key(1)
    placed = {name: jnp.asarray(x) for name, x in batch.items()} | {"example": jnp.arange(8)}

    def loss(params):
        return stage.loss(definition.merge(params), placed, key)[0]

    ours, grads = jax.value_and_grad(loss)(params)
    # The patches that `nn.regularize.keep_tokens` draws.
    keys = jax.vmap(lambda e: jax.random.fold_in(jax.random.fold_in(key, 0), e))(jnp.arange(8))
    order = jax.vmap(lambda k: jax.random.permutation(k, stage.patches)[: stage.kept])(keys)
    kept = torch.tensor(np.asarray(order)).long()
    model = TorchClip(stage.model, stage.text_length)
    model.copy_from(flatten(params))
    arrays = (torch.tensor(np.asarray(batch[name])) for name in ("image", "text", "text_mask"))
    theirs = model(*arrays, kept)
    theirs.backward()

    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    expected = model.translated(flatten(grads))
    named = dict(model.named_parameters())
    assert expected.keys() == named.keys()
    largest = max(float(np.abs(value).max()) for value in expected.values())
    for name, value in expected.items():
        found = named[name].grad.numpy()
        # A key's bias has no gradient but rounding.
        scale = max(float(np.abs(value).max()), 1e-3 * largest)
        np.testing.assert_allclose(found, value, atol=2e-4 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("stack", ["vit", "qllama"])
def test_gpu_stacks_are_the_same_function_and_run(stack: str):
    from tests.benchmarks import gpu_blocks
    from tests.benchmarks.torch_clip import llama_layer, vit_layer

    case = gpu_blocks.TINY[stack]
    build, apply = gpu_blocks.ours(case, dtype="float32")
    definition = Definition.of(build, lambda path: True)
    params = definition.fresh(0)
    x = np.random.default_rng(0).normal(size=(case.batch, case.tokens, case.width))
    x = x.astype(np.float32)
    ours = np.asarray(apply(definition.merge(params), jnp.asarray(x)))
    prefix, rename = {
        "vit": ("layers/", vit_layer),
        "qllama": ("periods/layers/first/", llama_layer),
    }[stack]
    layers = {
        path.removeprefix(prefix): np.asarray(value)
        for path, value in flatten(params).items()
        if path.startswith(prefix)
    }
    model = gpu_blocks.torch_stack(case)
    with torch.no_grad():
        for i in range(case.layers):
            for name, value in rename({k: v[i] for k, v in layers.items()}, "").items():
                model.layers[i].get_parameter(name).copy_(torch.tensor(value))
        theirs = model(torch.tensor(x)).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max(), rtol=0)

    figures = gpu_blocks.run_ours(case), gpu_blocks.run_torch(case)
    assert all(f.keys() == {"rate", "forward", "train"} for f in figures)


def test_layers_fill_the_card():
    from tests.benchmarks import gpu_blocks

    small, large = (gpu_blocks.fitting(gpu_blocks.FULL["vit"], g * 2**30) for g in (80, 141))
    assert 1 < small.layers < large.layers < 48
    per_token = 8 * 3200**2 + 4 * 3200 * 12800 + 4 * 257 * 3200
    assert small.forward_flops() == 32 * small.layers * 257 * per_token


def test_serving_compares_the_same_function(capsys: pytest.CaptureFixture[str]):
    from tests.benchmarks import torch_serving

    threads = torch.get_num_threads()
    options = ["--size", "tiny", "--rounds", "1", "--new", "5", "--batch", "3"]
    assert torch_serving.main([*options, "--device", "cpu"]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "100.0 % of the written ids are the same" in out
    assert float(out.split("encoding differs by ")[1].split()[0]) < 1e-5
    assert out.count("times as fast") == 2
