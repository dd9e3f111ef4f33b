"""g -> example: which record it is made of, its pictures, and what stands in for a bad one."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.examples import Builder
from data_pipelines.image import (
    RESIZES,
    Resample,
    canvas,
    crop_box,
    decode,
    random_resized_crop,
)
from data_pipelines.mixture import Mixture
from data_pipelines.sample import BadRecordError
from data_pipelines.sets import Set
from data_pipelines.shuffle import GlobalOrder, WindowOrder

ATTEMPTS = 8
NO_CROP = np.asarray((0, 0, 1, 1, 0), np.float32)


class BadRecordsError(RuntimeError):
    """Every substitute of a broken record was broken too."""


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
