"""Where pictures lie, and which of them are the same.

Paths are those of LLaVA-1.5's folder (``coco/train2017``, ``gqa/images``, ``ocr_vqa/images``,
``textvqa/train_images``, ``vg/VG_100K``), and one folder named after the set for the others. COCO's
pictures have several names, and Visual Genome lies in two folders: `alternatives` lists them.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re

_COCO_FILE = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:_\d+)?\.\w+")


def coco(identifier: int | str, split: str = "train2014") -> str:
    """The path of a COCO picture.

    Args:
        identifier: COCO's number.
        split: "train2014", "val2014", "train2017", …

    Returns:
        For example "coco/train2014/COCO_train2014_000000458752.jpg".
    """
    prefix = f"COCO_{split}_" if split.endswith("2014") else ""
    return f"coco/{split}/{prefix}{int(identifier):012d}.jpg"


def key(path: str) -> str:
    """Names the picture behind a path, whatever set shows it.

    Args:
        path: relative to the folder of pictures.

    Returns:
        "coco:458752" (also within ST-VQA and Toloka, which show COCO's pictures), "vg:2354786"
        (also for GQA and LRV, whose numbers are Visual Genome's), else folder and stem, e.g.
        "ocr_vqa:0310337561".
    """
    folder, _, rest = path.partition("/")
    name = rest.rpartition("/")[2]
    stem = name.rpartition(".")[0] or name
    if folder in ("coco", "stvqa", "toloka") and (match := _COCO_FILE.fullmatch(name)):
        return f"coco:{int(match[1])}"
    if (folder in ("vg", "gqa", "lrv") or path.startswith("stvqa/vg/")) and stem.isdecimal():
        return f"vg:{int(stem)}"
    return f"{folder}:{stem}"


def alternatives(path: str) -> tuple[str, ...]:
    """Other paths under which the same picture may lie.

    Args:
        path: relative to the folder of pictures.

    Returns:
        The path itself and the others; only itself for most sets.
    """
    kind, _, number = key(path).partition(":")
    folder = path.partition("/")[0]
    if folder == "coco" and kind == "coco":
        splits = ("train2014", "val2014", "train2017", "val2017")
        return tuple(dict.fromkeys((path, *(coco(number, split) for split in splits))))
    if folder in ("vg", "gqa") and kind == "vg":
        folders = ("vg/VG_100K", "vg/VG_100K_2", "gqa/images")
        return tuple(dict.fromkeys((path, *(f"{other}/{number}.jpg" for other in folders))))
    return (path,)


class Pictures:
    """A folder of pictures, each of its folders listed once.

    Args:
        root: the folder that paths are relative to.
    """

    def __init__(self, root: str | pathlib.Path):
        self.root = str(root)
        self._names = functools.lru_cache(maxsize=256)(self._list)

    def find(self, path: str) -> str | None:
        """The path under which a picture is there.

        Args:
            path: relative to the folder.

        Returns:
            This path or one of its `alternatives`, None if there is none.
        """
        for candidate in alternatives(path):
            folder, _, name = candidate.rpartition("/")
            if name in self._names(folder):
                return candidate
        return None

    def _list(self, folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(os.path.join(self.root, folder)))
        except OSError:
            return frozenset()
