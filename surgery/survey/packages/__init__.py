"""Builders of small models of other packages: one file a package, one function a model.

Each gives a model with random weights and inputs of one forward. Its docstring is the truth, read
off the source by hand, by which `python -m benchmarks.packages` judges what is found: the addresses
of networks (ffn), of what makes queries, keys and values (qkv), of what projects their result
(proj), of the head, and whether prompts may be put among the tokens. An address with ? may be
found or not; where a line says any, nothing is judged.
"""
