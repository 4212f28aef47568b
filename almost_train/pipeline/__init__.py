"""A whole recipe: every stage from prompts to the aligned policy, each in its own folder. Uses all other rooms. Start
with `run`.
"""
