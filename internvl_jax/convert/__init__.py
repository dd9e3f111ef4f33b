"""PyTorch weights in and out, and the proof that both models agree (`verify`).

`key_maps` names every tensor both ways, `from_torch` reads official files, `to_torch` writes them,
`verify` compares our models with stored outputs of the official ones. torch is never needed but to
read pickled files and to ask transformers' own classes.
"""
