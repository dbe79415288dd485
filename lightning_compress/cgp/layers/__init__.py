"""Layers whose weights are computed.

Reading order: `integers` (int8 weights of a model), `choices` (what they are computed from), `ordering` and `codes`
(how they are stored), `weights` (the transform), `writing` (a circuit of an experiment into a model).
"""
