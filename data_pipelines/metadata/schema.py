"""The schema that every source is read into."""

from __future__ import annotations

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("uid", pa.binary(16)),  # the source's own, else a hash of URL and caption
        pa.field("source", pa.dictionary(pa.int32(), pa.string())),
        pa.field("url", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("lang", pa.string()),  # code, e.g. "en"
        pa.field("width", pa.int32()),  # of the original picture, in pixels
        pa.field("height", pa.int32()),
        pa.field("similarity", pa.float32()),  # cosine of a CLIP's picture and text
        pa.field("punsafe", pa.float32()),  # probabilities
        pa.field("pwatermark", pa.float32()),
        pa.field("aesthetic", pa.float32()),  # 0 to 10
        pa.field("phash", pa.uint64()),  # perceptual hash, see `clean.phash`
        pa.field("sha256", pa.string()),  # of the picture's file, lower-case hex
        pa.field("status", pa.string()),  # of the download, "success" or not; null before it
        pa.field("key", pa.string()),  # of the downloaded sample in its tar
    ]
)
"""Null means that the source says nothing."""
