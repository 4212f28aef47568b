"""RMSP, reward-model-guided self-play: two vanilla models talk, and of N answers the best by reward is kept.

May use `common`, and the seeds and sampling of `synthetic`. Start with `run`; `turns` plays, `rules` rejects.
"""
