"""Synthetic comparisons from vanilla language models: prompts, responses, pairs (ALMoST, section 2.1).

Nothing heavy is imported here, and no stage imports torch before it has checked its input.
"""
