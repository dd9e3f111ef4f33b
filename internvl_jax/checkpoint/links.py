"""Leaves that rest in another checkpoint: a fine-tuned step need not hold what it never changed.

A link names the step that really stores the leaf, never another link. Where that step lies under
the folder that holds the linking run, the meta file spells it from there (``../../../base/…``), so
that a folder of runs can be moved as a whole; any other place is spelled in full. A tower that was
trained in float32 and rests in bfloat16 now is linked too: reading rounds it again, and what comes
out is compared with the fingerprint of what went in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

COMMITTED = "commit_success.txt"
_UP = "../"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf is stored.

    Attributes:
        step_dir: directory of the step: in memory its full path, in a meta file see the module.
        path: the leaf's name there.
    """

    step_dir: str
    path: str

    def seen_from(self, step_dir: epath.Path) -> Place:
        """As the meta file of a step ``<runs>/<run>/checkpoints/<step>`` spells it."""
        runs = str(step_dir.parent.parent.parent).rstrip("/") + "/"
        if not self.step_dir.startswith(runs):
            return self
        return Place(3 * _UP + self.step_dir.removeprefix(runs), self.path)

    def found_from(self, step_dir: epath.Path) -> Place:
        """The inverse: the full path, from what that step's meta file says."""
        where, rest = step_dir, self.step_dir
        if not rest.startswith(_UP):
            return self
        while rest.startswith(_UP):  # an object store knows no "..": climb here
            where, rest = where.parent, rest.removeprefix(_UP)
        return Place(str(where / rest), self.path)


def there(step_dir: str) -> bool:
    """Whether a step is where it was."""
    return (epath.Path(step_dir) / COMMITTED).exists()


def linked(
    leaves: Mapping[str, Any], elsewhere: Mapping[str, Any], step_dir: epath.Path
) -> tuple[dict[str, Any], list[str]]:
    """Link those leaves of a step that another checkpoint stores bit for bit.

    With several processes all must call this, with the same leaves.

    Args:
        leaves: `storage.Leaf` by path, as they are now.
        elsewhere: `storage.Leaf` by path, as they were once read, with their places.
        step_dir: directory of the step to be written.

    Returns:
        The leaves, and the steps that store some of them but are gone.
    """
    places = {
        path: elsewhere[path].at
        for path, leaf in leaves.items()
        # A leaf that has changed since differs in its fingerprint at least.
        if path in elsewhere and elsewhere[path] == dataclasses.replace(leaf, at=elsewhere[path].at)
    }
    bases = sorted({place.step_dir for place in places.values()})
    found = np.array([there(base) for base in bases], np.int32)
    if bases and jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(found)
    gone = [base for base, here in zip(bases, found, strict=True) if not here]
    result = {
        path: dataclasses.replace(leaf, at=places[path].seen_from(step_dir))
        if path in places and places[path].step_dir not in gone
        else leaf
        for path, leaf in leaves.items()
    }
    return result, gone
