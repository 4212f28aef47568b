"""Supervised fine-tuning on demonstrations (ALMoST, arXiv 2305.13735, section 3.2).

May use `almost_eval` and `common`. Start with `run`.
"""
