"""Synthetic comparisons from vanilla language models: prompts, responses, pairs (ALMoST, section 2.1).

Start with `prompts`, then `responses` and `comparisons`, which are stages. No stage imports torch before it has checked
its input. May use `almost_eval` and `common`.
"""
