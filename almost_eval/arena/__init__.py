"""Human preferences from a blind arena: `votes` on disk, and the `report` of what they say. Uses `stats`, `files`, and
`judge` and `run` for a judge's run over the same pairs. Start with `votes`.
"""
