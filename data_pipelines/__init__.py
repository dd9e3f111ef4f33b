"""From raw data to global batches.

==========================  ================================================================
`pipeline.make_pipeline`    (seed, step) -> global batch, for every stage; `drawing`: one example
`sets`                      what samples are drawn from: corpora, concepts, packed rows
`manifest.open_corpus`      a folder of your own, as `build` indexed or wrote it: samples by number
`sources`                   random access to records of tars, ArrayRecord, parquet
`metadata`, `clean`         the publishers' tables, and what is kept of them
`dialogue`                  stage 3's annotation files -> conversations
`evaluation`                held-out pictures, names and questions as arrays
`datasets.open_dataset`     the prepared sets of concepts: ``emoji``, ``shapes``
`text.Tokenizer`            a sentencepiece model with LLaMA's conventions; `text.train`
==========================  ================================================================

Tools: ``python -m data_pipelines.X`` with X build, clean, dialogue, inspect or benchmark.
Importing this package imports nothing else.
"""
