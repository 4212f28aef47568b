"""The reward model: Bradley-Terry training on comparisons (ALMoST, arXiv 2305.13735, section 3.1). Start with `run`."""
