"""The tf.data side of `data_pipelines.benchmark`, run by an interpreter that has TensorFlow.

    python tf_data.py FOLDER SIZE BATCH

Copies the JPEGs of the tars to TFRecords first. Every line on its input is answered with the CPU
and wall seconds per picture of one pass: decode, random crop, bicubic with antialiasing, uint8.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tarfile
import tempfile
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import tensorflow as tf


def picture(data, size):
    """One picture as the loader serves it, [S,S,3] uint8."""
    pixels = tf.io.decode_jpeg(data, channels=3)
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.shape(pixels),
        tf.zeros((1, 0, 4)),
        area_range=(0.9, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        use_image_if_no_bounding_boxes=True,
    )
    pixels = tf.slice(pixels, begin, extent)
    pixels = tf.image.resize(pixels, (size, size), method="bicubic", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)


def main() -> None:
    """Serves passes until the input ends."""
    folder, size, batch = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "pictures.tfrecord")
        with tf.io.TFRecordWriter(path) as writer:
            for tar_path in sorted(folder.glob("*.tar")):
                with tarfile.open(tar_path) as tar:
                    for member in tar:
                        if member.name.endswith(".jpg"):
                            writer.write(tar.extractfile(member).read())
        data = tf.data.TFRecordDataset(path)
        data = data.map(lambda jpeg: picture(jpeg, size), num_parallel_calls=1)
        data = data.batch(batch).prefetch(1)
        options = tf.data.Options()
        options.threading.private_threadpool_size = 1
        data = data.with_options(options)
        print(json.dumps({"version": f"TensorFlow {tf.__version__}"}), flush=True)
        for _ in sys.stdin:
            cpu, wall, count = time.process_time(), time.perf_counter(), 0
            for pictures in data:
                count += int(pictures.shape[0])
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(json.dumps({"cpu": cpu / count, "wall": wall / count}), flush=True)


if __name__ == "__main__":
    main()
