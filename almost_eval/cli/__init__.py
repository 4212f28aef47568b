"""Every command and flag of `almost-eval`, and what the command lines of all three packages share. click lives here
alone. Start with `main`.
"""
