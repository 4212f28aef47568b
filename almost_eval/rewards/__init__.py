"""Reward models: one raw logit for one conversation, by transformers, vLLM or a server. Uses `engines` and `models`.
Start with `base`, then `build`.
"""
