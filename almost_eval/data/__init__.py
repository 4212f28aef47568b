"""Data sets and prompt sets: the one place that finds a file that is not ours. Uses `files` and `nano`. Start with
`sources`, then `prompt_sets`.
"""
