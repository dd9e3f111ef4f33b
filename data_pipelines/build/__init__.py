"""Makes data sets ready: ``python -m data_pipelines.build VERB --help``.

=============  =====================================================================
``index``      counts and indexes tars, ArrayRecord, parquet, TFDS folders, in place
``convert``    a table with picture files, or an indexed set, to ArrayRecord
``verify``     compares a set with its manifest
``tokenizer``  a tokenizer of a set's texts, for models that start from nothing
``lengths``    what packing several conversations into a row needs to know
``emoji``      the demo's pictures and names (``shapes``: a generated set)
=============  =====================================================================

Done work is kept: an interrupted run goes on where it stopped.
"""

from data_pipelines.build.command import main
from data_pipelines.build.demo import build

__all__ = ["build", "main"]
