"""Pre-trains the nano family, the built-in models, measures them by ground truth, and makes the data of its recipe.

May use `almost_eval` and `common`. Start with `pretrain`.
"""
