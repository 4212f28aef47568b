"""An OpenAI-compatible gateway before a policy and a reward model: best-of-N, keys, limits. Uses `launch` and
`serving.models`. Start with `app`, which holds its routes.
"""
