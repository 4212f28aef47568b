"""One run of one task: from a `RunRequest` to the lines and results in its folder, and back again to verify them. Uses
`tasks`, `engines`, `rewards`. Start with `runner`.
"""
