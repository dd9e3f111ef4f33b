"""The open_clip side of `data_pipelines.benchmark`, run by an interpreter that has open_clip_torch,
webdataset<=0.2.86 (its bound), pandas and braceexpand.

    python open_clip_data.py FOLDER SIZE BATCH WORKERS

open_clip's own training loader over the tars (`open_clip_train.data.get_wds_dataset`), transforms
and tokenizer, with so many worker processes. Every line on its input is answered with the CPU and
wall seconds per picture of one pass, workers included.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import sys
import tarfile
import time
import types

import open_clip
import torch
from open_clip_train.data import get_wds_dataset


def cpu_time() -> float:
    """CPU seconds that this process and its workers have spent."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Serves passes until the input ends."""
    folder, size, batch = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    paths, pictures = sorted(folder.glob("*.tar")), 0
    for path in paths:
        with tarfile.open(path) as tar:
            pictures += sum(name.endswith(".jpg") for name in tar.getnames())
    arguments = types.SimpleNamespace(
        train_data="::".join(str(path) for path in paths),
        train_num_samples=pictures,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=int(sys.argv[4]),
        world_size=1,
    )
    transform = open_clip.transform.image_transform(size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(arguments, transform, is_train=True, floor=True, tokenizer=tokenizer)
    print(json.dumps({"version": f"open_clip {open_clip.__version__}"}), flush=True)
    for _ in data.dataloader:  # starts the workers
        pass
    for _ in sys.stdin:
        cpu, wall, count = cpu_time(), time.perf_counter(), 0
        for images, _texts in data.dataloader:
            count += len(images)
        cpu, wall = cpu_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu / count, "wall": wall / count}), flush=True)


if __name__ == "__main__":
    main()
