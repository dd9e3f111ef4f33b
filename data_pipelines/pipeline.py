"""(seed, step) -> global batch, the same for any number of hosts, workers and threads.

Example ``g = step * global_batch + place`` is a pure function of the config, the seed and g: the
mixture says which part it comes from and its how-manieth draw of it that is (`mixture`), the part's
order which record (`shuffle`), and everything else (which caption, which crop) is drawn from a
generator keyed by (seed, g). Hosts take contiguous slices of the global batch. Nothing is stored
between steps: a run resumes at any step, on any number of hosts.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.config import DataConfig, as_data_config
from data_pipelines.datasets import tokenizer_of
from data_pipelines.examples import Builder, make_builder
from data_pipelines.image import (
    RESIZES,
    Resample,
    canvas,
    crop_box,
    decode,
    random_resized_crop,
)
from data_pipelines.mixture import Drawn, Mixture
from data_pipelines.sample import BadRecordError
from data_pipelines.sets import Set, open_set
from data_pipelines.shuffle import GlobalOrder, WindowOrder
from data_pipelines.sources import storage
from data_pipelines.text import Tokenizer
from internvl_jax import batch as batches

ATTEMPTS = 8
OPEN_FILES = 256
"""Of a part: its source keeps up to 128, and lends each thread one more."""
STEPS = 1 << 31  # an upper bound; Grain wants a length
ELSEWHERE = (
    *("threads", "prefetch", "cache_bytes", "data_dir", "dataset", "mixture", "tokenizer"),
    *("image_size", "canvas", "visual_tokens"),
)
"""Settings that do not say which record comes when, or that a set's digest speaks for."""
NO_CROP = np.asarray((0, 0, 1, 1, 0), np.float32)


class BadRecordsError(RuntimeError):
    """Every substitute of a broken record was broken too."""


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One host's slice of a global batch.

    Attributes:
        arrays: as `internvl_jax.batch` describes, axis 0 the host's share of B.
        records: [B] int64, the record each example was made of, counted through all parts of the
            mixture (the concept's number in the language stage).
        valid: [B] bool, False where the record was bad and a good one, drawn by (seed, g), stands
            in its place.
        reasons: bad records of this slice by reason.
    """

    arrays: dict[str, np.ndarray]
    records: np.ndarray
    valid: np.ndarray
    reasons: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        arrays: without the batch axis.
        record: it was made of.
        reason: why the record that stood here first is bad; "" if it is not.
    """

    arrays: dict[str, np.ndarray]
    record: int
    reason: str


class Examples:
    """Random access to the examples of a stage by their global number."""

    def __init__(
        self,
        parts: Mapping[str, tuple[Set, Sequence[tuple[int, float]]]],
        builder: Builder,
        config: DataConfig,
        *,
        global_batch: int,
        seed: int,
        training: bool,
    ):
        """Puts an example together from its parts.

        Args:
            parts: name -> the set, and its weight from step to step.
            builder: makes an example's arrays.
            config: the data settings.
            global_batch: examples per step over all hosts.
            seed: of all randomness.
            training: crop and mirror at random where the config says so; else resize exactly.

        Raises:
            ValueError: if weights or lanes do not fit.
        """
        self.names, self.sets = tuple(parts), tuple(source for source, _ in parts.values())
        self.weights = tuple(weights for _, weights in parts.values())
        self.builder, self.config = builder, config
        self.seed, self.training = seed, training
        self.mixture = Mixture(
            self.weights,
            seed=seed,
            global_batch=global_batch,
            lanes=config.lanes,
        )
        self._orders = [
            _order(source, config, (seed, zlib.crc32(name.encode())))
            for name, source in zip(self.names, self.sets)
        ]
        self._firsts = np.cumsum([0, *(source.records for source in self.sets)])

    def __getitem__(self, number: int) -> Example:
        """Makes one example.

        Args:
            number: g, of the whole run.

        Returns:
            The example.

        Raises:
            BadRecordsError: if no substitute could be read.
        """
        part, lane, draw = self.mixture[number]
        source, unit, reason, said = self.sets[part], self._orders[part](lane, draw), "", ""
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((self.seed, number, attempt))
            if attempt:
                unit = int(rng.integers(len(source)))
            try:
                record, samples = source.draw(unit, rng)
                encoded = [image for sample in samples for image in sample.images]
                pictures = [self._picture(image, rng) for image in encoded]
                arrays = self.builder(samples, [pixels for pixels, _ in pictures], rng)
            except (BadRecordError, OSError) as error:
                # Not the error itself: through its traceback it would hold this frame, in a cycle.
                said = str(error)
                reason = reason or getattr(error, "reason", "unreadable")
                continue
            if self.config.canvas and "image" in arrays:
                arrays["crop"] = _crops([box for _, box in pictures], arrays["image"])
            return Example(arrays, int(self._firsts[part]) + record, reason)
        raise BadRecordsError(
            f"Example {number}: {ATTEMPTS} records in a row of {self.names[part]} cannot be used, "
            f"the last because: {said} Repair this part of the data, or leave it out."
        )

    def _picture(
        self, image: bytes | np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels as the batch has them, and the crop that is left to the device."""
        config = self.config
        pixels = decode(image) if isinstance(image, bytes) else image
        resample: Resample = config.resample if self.training else "exact"
        crop = self.training and bool(config.crop_scale)
        how: dict[str, Any] = dict(
            scale=config.crop_scale, ratio=config.crop_ratio, flip=config.flip
        )
        if config.canvas:
            pixels, (height, width) = canvas(pixels, config.canvas, resample)
            whole = np.asarray((0, 0, height, width, 0), np.float32)
            return pixels, crop_box(height, width, rng, **how) if crop else whole
        if crop:
            size = config.image_size
            return random_resized_crop(pixels, size, rng, **how, resample=resample), NO_CROP
        return RESIZES[config.resize](pixels, config.image_size, resample), NO_CROP


def _crops(boxes: Sequence[np.ndarray], image: np.ndarray) -> np.ndarray:
    """[5] of one picture, [M,5] of all slots."""
    if image.ndim == 3:
        return boxes[0]
    return np.stack([*boxes, *[NO_CROP] * (len(image) - len(boxes))])


def _order(source: Set, config: DataConfig, key: tuple[int, ...]) -> Callable[[int, int], int]:
    if config.order == "window":
        return WindowOrder(source.ends, window=config.window, lanes=config.lanes, key=key)
    return GlobalOrder(len(source), lanes=config.lanes, key=key)


class _HostBatches:
    """A host's batches by step, as Grain's random-access source.

    A batch, not an example, is the unit: Grain's bookkeeping costs as much as a small example.
    """

    def __init__(self, examples: Examples, global_batch: int, share: int, first: int):
        self._examples, self._global_batch = examples, global_batch
        self._share, self._first = share, first

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> HostBatch:
        start = int(index) * self._global_batch + self._first
        arrays: dict[str, np.ndarray] = {}
        records, reasons = np.empty(self._share, np.int64), []
        for place in range(self._share):
            example = self._examples[start + place]
            for name, value in example.arrays.items():
                if not place:
                    arrays[name] = np.empty((self._share, *value.shape), value.dtype)
                # Copied while the cache still holds it; stacked later it would come from memory.
                arrays[name][place] = value
            records[place] = example.record
            reasons.append(example.reason)
        valid = np.asarray([not reason for reason in reasons])
        return HostBatch(arrays, records, valid, collections.Counter(filter(None, reasons)))


class Pipeline:
    """Global batches of one stage and split, one host's slice of them."""

    def __init__(
        self,
        examples: Examples,
        spec: dict[str, tuple[tuple[int, ...], np.dtype]],
        *,
        global_batch: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Cuts the global batch for a host; `make_pipeline` is the usual way here.

        Args:
            examples: by global number.
            spec: what `spec` returns.
            global_batch: examples per step over all hosts.
            process_index: this host.
            process_count: hosts.

        Raises:
            ValueError: if the batch does not divide over the hosts.
        """
        if global_batch < 1 or global_batch % process_count:
            raise ValueError(
                f"A global batch of {global_batch} does not divide over {process_count} hosts; "
                "choose a multiple."
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"There is no host {process_index} among {process_count}.")
        import grain

        self._spec, self._examples, self._global_batch = spec, examples, global_batch
        share = global_batch // process_count
        source = _HostBatches(examples, global_batch, share, process_index * share)
        self._batches: Any = grain.MapDataset.source(source)
        self._open: list[Any] = []

    @property
    def digest(self) -> str:
        """Changes when another record comes at some step: of settings, sets, seed and batch.

        What does not matter for that is no part of it: threads, caches, the size of pictures, and
        where files lie.
        """
        examples = self._examples
        config = dataclasses.asdict(examples.config)
        for name in ELSEWHERE:
            del config[name]
        digests = [source.digest for source in examples.sets]
        parts = list(zip(examples.names, examples.weights, digests))
        text = repr((config, parts, examples.seed, self._global_batch))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def drawn(self, steps: int) -> list[Drawn]:
        """How often a run sees which part: nothing is repeated unsaid.

        Args:
            steps: of the run.

        Returns:
            One entry per part.
        """
        sets = self._examples.sets
        sizes = [len(source) for source in sets]
        return self._examples.mixture.drawn(self._examples.names, sizes, steps)

    def spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of the **global** batch; reads nothing.

        Returns:
            Array name -> (shape, dtype).
        """
        return dict(self._spec)

    def batch(self, step: int) -> HostBatch:
        """The host's slice of one step's batch.

        Args:
            step: >= 0.

        Returns:
            The slice.
        """
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> Iterator[HostBatch]:
        """Batches from a step on, without end, prepared ahead by threads.

        Args:
            start_step: the first one.

        Yields:
            The host's slices.
        """
        import grain

        config = self._examples.config
        # A thread prepares a whole batch, so no more are at work than batches are asked for.
        ahead = max(config.prefetch, config.threads)
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ahead)
        batches = iter(self._batches.slice(slice(start_step, None)).to_iter_dataset(options))
        self._open.append(batches)
        try:
            yield from batches
        finally:
            if batches in self._open:
                self._open.remove(batches)
                batches.close()

    def close(self) -> None:
        """Stops the threads of every iteration under way and closes the sets' files."""
        while self._open:
            self._open.pop().close()
        for source in self._examples.sets:
            source.close()


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the settings name, or that was built with the (first) set.

    Args:
        config: the data settings.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if it is none, or not of the model's vocabulary.
        FileNotFoundError: if it is missing.
    """
    first = next(iter(config.parts.values()))
    model = config.tokenizer or tokenizer_of(first.path, config.data_dir)
    return Tokenizer(model, vocab_size=config.vocab_size or None)


def make_pipeline(
    data_config: Any,
    stage: str,
    *,
    global_batch: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """The pipeline of a stage.

    Validation resizes without cropping, and draws evenly from the parts of a mixture that have such
    a split; in one lane, as they may hold fewer records than training has lanes.

    Args:
        data_config: settings of `DataConfig`, a mapping or a dataclass.
        stage: "language", "contrastive", "generative" or "finetune".
        global_batch: examples per step over all hosts.
        seed: of order, crops and captions, >= 0.
        split: "train" or "validation".
        process_index: this host.
        process_count: hosts.

    Returns:
        The pipeline.

    Raises:
        ValueError: if a setting is wrong.
        FileNotFoundError: if a data set or the tokenizer is missing.
    """
    config = as_data_config(data_config)
    if split not in ("train", "validation"):
        raise ValueError(f"Split {split!r} is not served; choose train or validation.")
    if seed < 0:
        raise ValueError(f"The seed {seed} is negative; choose one from 0 on.")
    spec = batches.spec(
        stage,
        batch=global_batch,
        text_length=config.text_length,
        image_size=config.image_size,
        image_slots=config.image_slots,
        canvas=config.canvas,
    )
    if split == "validation":
        config = dataclasses.replace(config, lanes=1)
    parts = config.parts
    tokenizer = open_tokenizer(config)
    builder = make_builder(stage, config, tokenizer)
    storage.allow_open_files(OPEN_FILES * (len(parts) + 4))  # jax, threads and metrics need some
    sets: dict[str, tuple[Set, Sequence[tuple[int, float]]]] = {}
    for name, part in parts.items():
        try:
            source = open_set(part.path, stage, split, config, tokenizer)
        except FileNotFoundError:
            if split == "train" or len(parts) == 1 or (not sets and name == list(parts)[-1]):
                raise
            continue
        weights = part.schedule(len(source)) if split == "train" else ((0, float(len(source))),)
        sets[name] = (source, weights)
    examples = Examples(
        sets, builder, config, global_batch=global_batch, seed=seed, training=split == "train"
    )
    return Pipeline(
        examples,
        spec,
        global_batch=global_batch,
        process_index=process_index,
        process_count=process_count,
    )
