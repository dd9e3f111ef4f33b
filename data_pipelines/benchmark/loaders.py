"""What is timed: our loader and its stages, and the loaders of others."""

from __future__ import annotations

import io
import json
import pathlib
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines.manifest import Corpus

BATCH = 64
TEXT_LENGTH = 32
SCALE = (0.9, 1.0)
PEERS = {
    "open_clip": {
        "open_clip": ("open_clip_data.py", "0"),
        "open_clip, 2 workers": ("open_clip_data.py", "2"),
    },
    "tensorflow": {"tf.data": ("tf_data.py",)},
}
"""Name of an interpreter -> its loaders, each a script and what it is told besides."""
SCRIPTS = pathlib.Path(__file__).parents[2] / "tests" / "benchmarks"


def ours(
    folder: pathlib.Path, tokenizer: Any, size: int, resample: str, threads: int
) -> Callable[[], int]:
    """The pipeline of stage 1.

    Args:
        folder: with the manifest.
        tokenizer: of the captions.
        size: side of a picture in pixels.
        resample: "fast" or "exact".
        threads: that make batches.

    Returns:
        A pass over the shards, which gives the number of pictures.
    """
    from data_pipelines.pipeline import make_pipeline

    config = {
        "dataset": str(folder),
        "tokenizer": str(tokenizer.path),
        "image_size": size,
        "text_length": TEXT_LENGTH,
        "crop_scale": SCALE,
        "resample": resample,
    }
    pipeline = make_pipeline(config, "contrastive", global_batch=BATCH, seed=0)
    steps = range(-(-pipeline.drawn(1)[0].records // BATCH))

    def run() -> int:
        if threads == 1:
            return sum(len(pipeline.batch(step).records) for step in steps)
        with ThreadPoolExecutor(threads) as pool:
            return sum(len(batch.records) for batch in pool.map(pipeline.batch, steps))

    return run


def webdataset_style(folder: pathlib.Path, tokenizer: Any, size: int) -> Callable[[], int]:
    """The usual loader: PIL and float32.

    Args:
        folder: with the shards.
        tokenizer: of the captions.
        size: side of a picture in pixels.

    Returns:
        A pass over the shards, which gives the number of pictures.

    Raises:
        ImportError: if webdataset is not installed.
    """
    import webdataset
    from PIL import Image

    from data_pipelines.image import crop_box
    from internvl_jax.batch import MEAN, STD

    mean, std = (np.asarray(x, np.float32)[:, None, None] for x in (MEAN, STD))
    rng = np.random.default_rng(0)

    def picture(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.convert("RGB")
        top, left, height, width, _ = crop_box(pixels.height, pixels.width, rng, scale=SCALE)
        pixels = pixels.crop((left, top, left + width, top + height))
        pixels = pixels.resize((size, size), Image.Resampling.BICUBIC)
        out = np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1)).astype(np.float32)
        out /= 255
        out -= mean
        out /= std
        return out

    def text(data: bytes) -> np.ndarray:
        return tokenizer.encode(data.decode(), TEXT_LENGTH)[0]

    def run() -> int:
        paths = [str(path) for path in sorted(folder.glob("*.tar"))]
        make: Any = webdataset.WebDataset  # pyright: ignore[reportAttributeAccessIssue]
        samples = make(paths, shardshuffle=False).to_tuple("jpg", "txt")
        batches = samples.map_tuple(picture, text).batched(BATCH)
        return sum(len(arrays[0]) for arrays in iter(batches))

    return run


def stages(corpus: Corpus, tokenizer: Any, size: int) -> dict[str, Callable[[], int]]:
    """Every stage alone, on a batch of pictures.

    Args:
        corpus: the shards.
        tokenizer: of the captions.
        size: side of a picture in pixels.

    Returns:
        Name -> the stage's work, which gives the number of pictures.
    """
    from PIL import Image

    from data_pipelines import image

    samples = [corpus.sample(number) for number in range(min(2 * BATCH, len(corpus)))]
    raw: list[tuple[Any, str]] = [(s.images[0], s.captions[0].text) for s in samples]
    decoded = [image.decode(data) for data, _ in raw]
    crops = [image.resize_square(pixels, size) for pixels in decoded]
    out = np.empty((len(raw), size, size, 3), np.uint8)

    def crop(number: int, resample: str) -> None:
        rng = np.random.default_rng((0, number))
        options: dict[str, Any] = {"scale": SCALE, "resample": resample}
        image.random_resized_crop(decoded[number], size, rng, **options)

    def pil(number: int) -> None:
        np.asarray(Image.open(io.BytesIO(raw[number][0])).convert("RGB"))

    def store(number: int) -> None:
        out[number] = crops[number]

    work: dict[str, Callable[[int], Any]] = {
        "read": lambda n: corpus.sample(n),
        "decode": lambda n: image.decode(raw[n][0]),
        "decode, PIL": pil,
        "crop and resize, fast": lambda n: crop(n, "fast"),
        "crop and resize, exact": lambda n: crop(n, "exact"),
        "canvas (crop on the device)": lambda n: image.canvas(decoded[n], max(decoded[n].shape)),
        "tokenise": lambda n: tokenizer.encode(raw[n][1], TEXT_LENGTH),
        "put into the batch": store,
        "normalise to float32": lambda n: (crops[n].astype(np.float32) / 255 - 0.5) / 0.25,
    }

    def each(one: Callable[[int], Any]) -> int:
        for number in range(len(raw)):
            one(number)
        return len(raw)

    return {name: lambda one=one: each(one) for name, one in work.items()}


class Peer:
    """A loader in another interpreter, which runs a pass when asked."""

    def __init__(self, python: str, script: str, *rest: str, folder: pathlib.Path, size: int):
        """Starts the interpreter.

        Args:
            python: the interpreter's path.
            script: in tests/benchmarks.
            *rest: of its arguments.
            folder: with the shards.
            size: side of a picture in pixels.

        Raises:
            OSError: if it does not start.
        """
        self._script = SCRIPTS / script
        if not self._script.exists():
            raise OSError(f"{self._script} is missing; --peer needs a checkout.")
        command = [python, str(self._script), str(folder), str(size), str(BATCH), *rest]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.version = self._answer()["version"]

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise OSError(f"{self._script} stopped; what it said is above.")
        return json.loads(line)

    def __call__(self) -> tuple[float, float]:
        """One pass.

        Returns:
            CPU and wall seconds per picture.
        """
        assert self._process.stdin
        self._process.stdin.write("pass\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["cpu"], answer["wall"]

    def close(self) -> None:
        """Ends the interpreter."""
        self._process.communicate()
