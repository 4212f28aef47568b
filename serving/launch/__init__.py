"""Child processes that serve HTTP: started, watched and ended together. Uses nothing else of `serving`. Start with
`process`.
"""
