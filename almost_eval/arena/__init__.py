"""Human preferences from a blind arena: votes on disk, and what they say. Uses `stats` and `files`. Start with
`votes`.
"""
