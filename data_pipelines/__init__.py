"""From raw data to global batches.

==========================  ================================================================
`pipeline.make_pipeline`    (seed, step) -> global batch, for every stage
`evaluation`                held-out pictures, names and questions as arrays
`datasets.open_dataset`     the prepared sets: ``emoji``, ``shapes``, or a folder of that format
`text.Tokenizer`            a sentencepiece model with LLaMA's conventions; `text.train`
`manifest.open_corpus`      a folder of your own, as `build` indexed or wrote it: samples by number
`sources`                   random access to records of tars, ArrayRecord, parquet
==========================  ================================================================

Tools: ``python -m data_pipelines.build``, ``python -m data_pipelines.inspect``.
Importing this package imports nothing else.
"""
