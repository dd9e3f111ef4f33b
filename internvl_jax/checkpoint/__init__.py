"""Checkpoints: written in the background, checked bit by bit when read, handed from stage to stage.

manager     Checkpoints: save, restore (any mesh, newest intact step), retention
initialize  where a run starts: resume > handoff > weights > scratch
transfer    parameters of another run or model: rename, resize, account for every leaf
preemption  SIGTERM, heard at the same step by every process
offline     read a checkpoint without a device, layer by layer
links       leaves that rest in another run's checkpoint instead of being stored again
storage     what a step looks like on disk · integrity: fingerprints · tree: paths of leaves
reading     the arrays of a step, every leaf checked · writer: a step without a device, by rows
"""

from internvl_jax.checkpoint.initialize import Start, initialize, scratch_from
from internvl_jax.checkpoint.manager import Checkpoints
from internvl_jax.checkpoint.offline import iter_leaves, read_tree
from internvl_jax.checkpoint.preemption import Preemption
from internvl_jax.checkpoint.storage import CheckpointError, CheckpointMismatch
from internvl_jax.checkpoint.transfer import ArraySource, CheckpointSource, Report, Transfer

__all__ = [
    "Checkpoints",
    "CheckpointError",
    "CheckpointMismatch",
    "initialize",
    "scratch_from",
    "Start",
    "Transfer",
    "CheckpointSource",
    "ArraySource",
    "Report",
    "Preemption",
    "read_tree",
    "iter_leaves",
]
