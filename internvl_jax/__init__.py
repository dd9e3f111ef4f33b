"""The InternVL family in JAX: three alignment stages through one train loop.

A stage says *what* is learned, a model says *what an axis means*, one rules table says *where* it
lives. Each verb is a package with a door, `python -m internvl_jax.<verb> --help`:

    train     run a stage    generate  captions and dialogue with a trained model
    convert   PyTorch weights out, and the proof that both models agree (`verify`)
    plan      what a run would need and how fast it could be, on TPUs that are not there

What they stand on: `nn` (blocks), `models`, `losses`, `stages`, `sharding`, `checkpoint`,
`evaluate`, `observe`, `batch` (what a batch holds), `config`, `chips`, `tree`.
Data comes from `data_pipelines`. Importing this package loads nothing else.
"""

__version__ = "0.1.0"
