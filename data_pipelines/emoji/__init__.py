"""Emoji: four vendors' drawings of some 1,900 concepts, with their names in 20 languages.

fetch.py     the npm packages, pinned and checked
names.py     concepts, names and keywords out of Unicode CLDR
drawings.py  vendors' icons, and their rasterisation
split.py     which drawings are trained on, tuned on, judged
emoji_dataset_builder.py  the TFDS builder
"""
