"""From raw tables of URLs and captions to those that are trained on.

==================  =========================================================================
`config`            every setting; `configs/clean_stage1.py`, `configs/clean_stage2.py`
`signals`           stage 1's rules: similarity, watermark, unsafe, aesthetic, size, length
`captions`          stage 2's rules on the text alone, with `patterns`
`language`          optional language identification
`decontaminate`     rows that are in evaluation sets; also a command that makes the list
`rules`             all of them in order: batch -> reason of every row
`duplicates`        which rows are duplicates, by key or by Hamming distance
`semantic`          near-duplicates by embedding; also a command that makes the list
`phash`             the perceptual hash of a picture
`steps`             what a driver does to one part of the corpus
`local`, `beam`     the two drivers
`report`, `page`    the figures, as a table and as a page
==================  =========================================================================

Importing this package imports nothing else.
"""
