"""Benchmarks, one file each: what a model reads, and what its answers are worth. Uses `data`, `models` and the
protocols of `engines`. Start with `base`, then `hhh`.
"""
