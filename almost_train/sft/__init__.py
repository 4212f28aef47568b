"""Supervised fine-tuning on demonstrations (ALMoST, arXiv 2305.13735, section 3.2). Start with `run`."""
