"""Benchmarks, one file each: what is asked of a model, and what its answers are worth. Uses `data`, `models` and the
protocols of `engines`. Start with `base`, then `hhh`.
"""
