"""Evaluators: a frozen dataclass that holds data and protocol, ``run(model) -> {name: value}``.

Names are flat, ``<list>.<language>.<figure>``, e.g. ``fluent.en.i2t_R@10``; beside every figure
stand the number of cases it was computed on and the level of chance.

name_retrieval  picture -> name and name -> picture, InternVL-C and -G
matching        does this name fit this picture (ITM)
captions        generated names and keywords
dialogue        closed questions to the chat model
"""
