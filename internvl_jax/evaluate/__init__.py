"""Judging a model: what it can do on pictures it was never trained on, beside chance.

runner      the evaluations of a stage's model, and the examples its report shows
evaluators  one class a protocol, ``run(model) -> {name: value}``
metrics     pure NumPy
embed       images and texts -> unit vectors, jitted, in batches
report      one self-contained page
"""
