"""Evaluate language models aligned by synthetic feedback (ALMoST, arXiv 2305.13735)."""

__version__ = "0.2.0"
