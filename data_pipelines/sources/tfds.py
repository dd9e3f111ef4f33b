"""`tf.train.Example`, which TFDS and `data_pipelines.build` write, without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.sample import BadRecordError
from data_pipelines.sources import Fields, Source


class ExampleSource:
    """All fields of serialised `tf.train.Example` records."""

    def __init__(self, records: Source[bytes]):
        """Wraps the records.

        Args:
            records: serialised examples, e.g. an `ArrayRecordSource`.
        """
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Fields:
        return fields(self._records[index])

    def close(self) -> None:
        """Closes the records' files."""
        close = getattr(self._records, "close", None)
        if close is not None:
            close()


class PictureSource:
    """The field "image" of serialised `tf.train.Example` records."""

    def __init__(self, records: Source[bytes]):
        """Wraps the records.

        Args:
            records: serialised examples, e.g. an `ArrayRecordSource`.
        """
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        return parse(self._records[index], "image")


def fields(record: bytes) -> Fields:
    """All fields of a serialised example.

    Args:
        record: the serialised `tf.train.Example`.

    Returns:
        Name (nested ones joined by "/") -> bytes, int or float, a list of these where there are
        several, None where there is none.

    Raises:
        BadRecordError: if the record is no example.
    """
    found: dict[str, Any] = {}
    for name, feature in _features(record).items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        found[name] = values[0] if len(values) == 1 else values or None
    return found


def parse(record: bytes, field: str) -> bytes:
    """One bytes field of a serialised example.

    Args:
        record: the serialised `tf.train.Example`.
        field: its name; nested fields are joined by "/".

    Returns:
        The first value.

    Raises:
        BadRecordError: if the record is broken or has no such field.
    """
    features = _features(record)
    if field not in features or not features[field].bytes_list.value:
        raise BadRecordError(
            "broken", f"A record has no field {field!r}; it was not written by our builder."
        )
    return features[field].bytes_list.value[0]


def serialize(values: Mapping[str, Sequence[bytes]]) -> bytes:
    """Makes a record.

    Args:
        values: field -> its values.

    Returns:
        The serialised `tf.train.Example`; the same values always give the same bytes.
    """
    example = _messages().Example()
    for name, items in values.items():
        example.features.feature[name].bytes_list.value.extend(items)
    return example.SerializeToString(deterministic=True)


def _features(record: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return _messages().Example.FromString(record).features.feature
    except DecodeError as error:
        raise BadRecordError(
            "broken", "A record is no tf.train.Example; build the data set again."
        ) from error


def _messages() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2  # its classes are made at run time
