"""Every command and flag of `almost-train`; only this room imports click.

May use every other room. Start with `main`; a stage's flags are made from its settings dataclass by `settings`.
"""
