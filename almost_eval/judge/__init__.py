"""Pairwise judging: prompts, the client, verdicts, and what is made of them."""
