"""Which drawings are trained on, tuned on and judged: fixed rules, the same on every machine.

1. A concept is an emoji without skin tone that has an English name in CLDR and is drawn by at
   least one training vendor (Noto, Twemoji, EmojiOne).
2. `unseen`: the tenth of all concepts whose SHA-256 of "unseen:" + key comes first. None of their
   drawings, names or keywords is trained on.
3. `held_out`: every drawing of Fluent, seen or unseen. Fluent is never trained on.
4. `validation`: of the other concepts that two or more training vendors draw, the eighth whose
   hash with "validation:" comes first gives up one drawing, whose vendor the same hash chooses.
   Tune on these; look at `held_out` once.
5. `judged`: the seen concepts of one code point that Fluent draws, except people, faces and flags
   (groups "People & Body", "Smileys & Emotion", "Flags"), which differ in details that are lost
   at 40 pixels. The build fails if they are fewer than `MIN_JUDGED`.

With the pinned packages: 1,900 concepts (270 flags), 190 unseen, 943 judged; drawings 4,190 train,
213 validation, 485 unseen (training vendors), 1,580 held_out (Fluent, 162 of unseen concepts).
A vendor may draw two concepts alike: 8 drawings of `unseen` and 4 of `validation` (families, flags
of territories) equal a training drawing of another concept to the pixel; none of Fluent's does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from data_pipelines.emoji.drawings import HELD_OUT_VENDOR, TRAINING_VENDORS

NOT_JUDGED = ("People & Body", "Smileys & Emotion", "Flags")
MIN_JUDGED = 800


def choose_unseen(keys: Iterable[str]) -> set[str]:
    """Rule 2.

    Args:
        keys: all concepts.

    Returns:
        A tenth of them.
    """
    return _first(keys, "unseen:", 10)


def choose_validation(drawn: Mapping[str, Iterable[str]], unseen: set[str]) -> dict[str, str]:
    """Rule 4.

    Args:
        drawn: concept -> vendors that draw it.
        unseen: from `choose_unseen`.

    Returns:
        concept -> the training vendor whose drawing is kept back.
    """
    vendors = {
        key: [vendor for vendor in TRAINING_VENDORS if vendor in drawn[key]]
        for key in drawn
        if key not in unseen
    }
    several = [key for key, names in vendors.items() if len(names) > 1]
    return {
        key: vendors[key][_hash("validation:", key)[-1] % len(vendors[key])]
        for key in _first(several, "validation:", 8)
    }


def is_judged(key: str, group: str, vendors: Iterable[str], unseen: set[str]) -> bool:
    """Rule 5.

    Args:
        key: the concept.
        group: its group.
        vendors: that draw it.
        unseen: from `choose_unseen`.

    Returns:
        Whether it is on the list.
    """
    single = "-" not in key
    return single and HELD_OUT_VENDOR in vendors and group not in NOT_JUDGED and key not in unseen


def _hash(salt: str, key: str) -> bytes:
    return hashlib.sha256((salt + key).encode()).digest()


def _first(keys: Iterable[str], salt: str, share: int) -> set[str]:
    ranked = sorted(keys, key=lambda key: _hash(salt, key))
    return set(ranked[: len(ranked) // share])
