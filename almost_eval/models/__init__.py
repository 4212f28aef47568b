"""A checkpoint and how it speaks: where it is, what it may hold, its chat template, what it thinks before it answers,
where an answer stops. Uses `files` and `nano`. Start with `checkpoint`, then `chat`, `reasoning` and `stops`.
"""
