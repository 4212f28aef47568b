"""Pairwise judging: questions and answers, what a judge is shown, its verdicts, and what they say of two systems. Uses
`run` for the folder, `engines` for the answers. Start with `records`, then `run`.
"""
