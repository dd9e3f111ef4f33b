"""Encoded pictures out of records that TFDS wrote."""

from __future__ import annotations

from typing import Any

from data_pipelines.sources import Source


class PictureSource:
    """The field "image" of serialised `tf.train.Example` records, read without TensorFlow."""

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


def parse(record: bytes, field: str) -> bytes:
    """One bytes field of a serialised example.

    Args:
        record: the serialised `tf.train.Example`.
        field: its name; nested fields are joined by "/".

    Returns:
        The first value.

    Raises:
        ValueError: if the record is broken or has no such field.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    example: Any = tf_example_pb2  # its classes are made at run time

    try:
        features = example.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError("A record is no tf.train.Example; build the data set again.") from error
    if field not in features or not features[field].bytes_list.value:
        raise ValueError(f"A record has no field {field!r}; it was not written by our builder.")
    return features[field].bytes_list.value[0]
