"""Stage 3's annotation files, whatever their layout, as one kind of conversation record.

=======================  ===================================================================
`sets.SETS`, `read`      every set of the paper's Table 3 by name, and its conversations
`conversation`           the record: LLaVA's format, with source, task and box
`prompts`, `boxes`       the words that ask for a form of answer; how a box is written
`held_out`               pictures of evaluation sets, which no conversation may show
`annotations`            reading JSON, JSON lines, gzip, and pickles that may only hold data
=======================  ===================================================================

``python -m data_pipelines.dialogue --root data/raw --out data/stage3`` writes them, one
``conversations.jsonl`` per set, ready to be packed with their pictures.
"""
