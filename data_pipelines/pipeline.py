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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.config import DataConfig, as_data_config
from data_pipelines.datasets import tokenizer_of
from data_pipelines.drawing import Examples
from data_pipelines.examples import make_builder
from data_pipelines.mixture import Drawn
from data_pipelines.sets import Set, open_set
from data_pipelines.sources import storage
from data_pipelines.text import Tokenizer
from internvl_jax import batch as batches

STEPS = 1 << 31  # an upper bound; Grain wants a length
OPEN_FILES = 256
"""Of a part: its source keeps up to 128, and lends each thread one more."""
ELSEWHERE = (
    *("threads", "prefetch", "cache_bytes", "data_dir", "dataset", "mixture", "tokenizer"),
    *("image_size", "canvas", "visual_tokens"),
)
"""Settings that do not say which record comes when, or that a set's digest speaks for."""


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
