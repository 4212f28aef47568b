"""The reward model: Bradley-Terry training on comparisons (ALMoST, arXiv 2305.13735, section 3.1).

May use `common`, `synthetic` and all of `almost_eval`. Start with `run`; `pairs` reads the comparisons and measures the
rewards of held-out pairs.
"""
