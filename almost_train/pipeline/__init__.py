"""A whole recipe: every stage from prompts to the aligned policy, each in its own folder.

May use every other room of `almost_train` but `cli`. Start with `run`; `recipe` reads the file, `plan` makes a call of
each section, `evaluation` measures the policies, `summary` makes the tables and the picture.
"""
