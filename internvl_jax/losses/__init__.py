"""Losses: pure functions on arrays, in float32, that never hold more than a chunk of their logits.

contrastive   softmax_loss (CLIP; ITC), sigmoid_loss (SigLIP): over the global batch
matching      matching_loss (ITM), sample_hard_negatives
captioning    next_token_loss, chunked_next_token_loss (ITG, dialogue)
"""
