"""(seed, step) -> global batch, the same for any number of hosts, workers and threads.

Example ``g = step * global_batch + place`` is a pure function of the seed and g: it takes the
``g % n``-th unit of epoch ``g // n`` in that epoch's permutation, and draws everything else (which
drawing, crop, language, caption) from a generator keyed by (seed, g). A unit is a concept with all
its drawings in the split, so that a batch rarely holds two pictures with one name. Hosts take
contiguous slices of the global batch. Nothing is stored between steps: a run resumes at any step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.config import DataConfig, as_data_config
from data_pipelines.datasets import Dataset, open_dataset, tokenizer_of
from data_pipelines.examples import Builder, make_builder
from data_pipelines.image import RESIZES, BadImageError, decode, random_resized_crop
from data_pipelines.shuffle import permute
from data_pipelines.text import Tokenizer
from internvl_jax import batch as batches

ATTEMPTS = 8
STEPS = 1 << 31  # an upper bound; Grain wants a length


class BadRecordsError(RuntimeError):
    """Every substitute of a broken record was broken too."""


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One host's slice of a global batch.

    Attributes:
        arrays: as `internvl_jax.batch` describes, axis 0 the host's share of B.
        records: [B] int64, the record each example was made of (the concept's number in the
            language stage).
        bad: examples of this slice whose first record was broken and which a substitute fills.
    """

    arrays: dict[str, np.ndarray]
    records: np.ndarray
    bad: int


class Pictures:
    """Decoded pictures of a set, kept in memory while there is room.

    Under a global shuffle every record is equally likely to come next, so nothing is evicted.
    """

    def __init__(self, dataset: Dataset, cache_bytes: int):
        """Wraps the pictures.

        Args:
            dataset: the set.
            cache_bytes: memory for decoded pictures.
        """
        self._source, self._room = dataset.pictures, cache_bytes
        self._cache: dict[int, np.ndarray] = {}

    def __getitem__(self, record: int) -> np.ndarray:
        """Decodes one picture.

        Args:
            record: its number.

        Returns:
            [H,W,3] uint8, not to be written to.

        Raises:
            BadImageError: if it cannot be decoded.
        """
        pixels = self._cache.get(record)
        if pixels is None:
            pixels = decode(self._source[record])
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._cache[record] = pixels
        return pixels

    def __getstate__(self):
        room = self._room + sum(pixels.nbytes for pixels in self._cache.values())
        return {"_source": self._source, "_room": room, "_cache": {}}


class Examples:
    """Random access to the examples of a stage by their global number."""

    def __init__(
        self,
        units: Sequence[np.ndarray],
        concept: np.ndarray,
        pictures: Pictures | None,
        builder: Builder,
        config: DataConfig,
        seed: int,
        augment: bool,
    ):
        """Puts an example together from its parts.

        Args:
            units: record numbers of every unit, one array each.
            concept: concept number of every record.
            pictures: decoded pictures by record, None for a stage of texts alone.
            builder: makes an example's arrays.
            config: the data settings.
            seed: of all randomness.
            augment: crop and mirror at random, or resize only.
        """
        self.units, self.concept, self.pictures = units, concept, pictures
        self.builder, self.config = builder, config
        self.seed, self.augment = seed, augment

    def __getitem__(self, number: int) -> tuple[dict[str, np.ndarray], int, bool]:
        """Makes one example.

        Args:
            number: g, of the whole run.

        Returns:
            Its arrays, its record, and whether the record is a substitute.

        Raises:
            BadRecordsError: if no substitute could be read.
        """
        epoch, position = divmod(number, len(self.units))
        record, reason = -1, None
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((self.seed, number, attempt))
            if attempt == 0:
                unit = self.units[permute(position, len(self.units), self.seed, epoch)]
            else:
                unit = self.units[int(rng.integers(len(self.units)))]
            record = int(unit[rng.integers(len(unit))])
            try:
                image = self._picture(record, rng)
            except BadImageError as error:
                reason = error
                continue
            arrays = self.builder(image, int(self.concept[record]), rng)
            return arrays, record, attempt > 0
        raise BadRecordsError(
            f"Example {number}: {ATTEMPTS} records in a row cannot be read, the last, {record}, "
            f"because: {reason} Build the data set again."
        )

    def _picture(self, record: int, rng: np.random.Generator) -> np.ndarray | None:
        if self.pictures is None:
            return None
        config, pixels = self.config, self.pictures[record]
        if not self.augment:
            return RESIZES[config.resize](pixels, config.image_size)
        return random_resized_crop(
            pixels,
            config.image_size,
            rng,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            flip=config.flip,
        )


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
        examples = [self._examples[start + place] for place in range(self._share)]
        arrays = {
            name: np.stack([arrays[name] for arrays, _, _ in examples]) for name in examples[0][0]
        }
        records = np.asarray([record for _, record, _ in examples], np.int64)
        return HostBatch(arrays, records, sum(bad for _, _, bad in examples))


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

        self._spec, self._config = spec, examples.config
        share = global_batch // process_count
        source = _HostBatches(examples, global_batch, share, process_index * share)
        self._batches: Any = grain.MapDataset.source(source)
        self._open: list[Any] = []

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

        options = grain.ReadOptions(
            num_threads=self._config.threads, prefetch_buffer_size=self._config.prefetch
        )
        batches = iter(self._batches.slice(slice(start_step, None)).to_iter_dataset(options))
        self._open.append(batches)
        try:
            yield from batches
        finally:
            if batches in self._open:
                self._open.remove(batches)
                batches.close()

    def close(self) -> None:
        """Stops the threads of every iteration under way."""
        while self._open:
            self._open.pop().close()


@functools.lru_cache(maxsize=4)
def _shared_pictures(name: str, data_dir: str, cache_bytes: int) -> tuple[Dataset, Pictures]:
    # Phases and splits of a run decode each picture once.
    dataset = open_dataset(name, data_dir)
    return dataset, Pictures(dataset, cache_bytes)


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

    Validation resizes without cropping; its language stage reads the texts of unseen concepts.

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
        FileNotFoundError: if the data set or the tokenizer is missing.
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
    )
    dataset, pictures = _shared_pictures(config.dataset, config.data_dir, config.cache_bytes)
    model = config.tokenizer or tokenizer_of(config.dataset, config.data_dir)
    tokenizer = Tokenizer(model, vocab_size=config.vocab_size or None)
    if stage == "language":
        wanted = split == "validation"
        numbers = [i for i, concept in enumerate(dataset.concepts) if concept.unseen == wanted]
        units = [np.asarray([i]) for i in numbers]
        concept = np.arange(len(dataset.concepts))
    else:
        units, concept = group_by_concept(dataset, split), dataset.concept
    units = [u for u in units if dataset.concepts[concept[u[0]]].group not in config.skip_groups]
    if not units:
        raise ValueError(
            f"The split {split!r} of {config.dataset!r} is empty; look at data.skip_groups."
        )
    examples = Examples(
        units=units,
        concept=concept,
        pictures=None if stage == "language" else pictures,
        builder=make_builder(stage, config, tokenizer, dataset.concepts),
        config=config,
        seed=seed,
        augment=split == "train",
    )
    return Pipeline(
        examples,
        spec,
        global_batch=global_batch,
        process_index=process_index,
        process_count=process_count,
    )


def group_by_concept(dataset: Dataset, split: str) -> list[np.ndarray]:
    """The records of a split, those of one concept together.

    Args:
        dataset: the set.
        split: its split.

    Returns:
        Record numbers of each concept, in the order of concepts.
    """
    records = dataset.splits[split]
    order = np.argsort(dataset.concept[records], kind="stable")
    concepts = dataset.concept[records][order]
    return np.split(records[order], np.flatnonzero(np.diff(concepts)) + 1) if len(records) else []
