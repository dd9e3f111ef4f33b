"""Generation: captions with QLLaMA, answers with a chat model.

settings  how to search: greedy, beams, sampling
cache     keys and values of the tokens so far; one prefill, one step
decode    the loops of greedy search and sampling
beam      beam search
prompt    from images and token ids to new ids: `caption`, `chat`, `left_pad`
"""
