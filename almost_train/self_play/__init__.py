"""RMSP, reward-model-guided self-play: two vanilla models talk, and of N answers the best by reward is kept. Start with
`run`.
"""
