"""Prompt families: what a judge is shown, and how its reviews are read. One line for each; MT-Bench's two share a file.

A family is a `PromptFamily` (see `judge.prompts`), which states all of itself: what it is, how its reviews are read,
its own wording with the categories of questions (a `.yaml` beside it), and where the official wording comes from.
"""

FAMILIES = {
    "vicuna": "almost_eval.judge.families.vicuna:FAMILY",
    "mt-bench": "almost_eval.judge.families.mt_bench:FAMILY",
    "mt-bench-single": "almost_eval.judge.families.mt_bench:FAMILY_OF_ONE",
}
"""Name -> import path."""

DEFAULT_FAMILY = "vicuna"
"""Where none is named. The archived reviews are its too."""
FAMILY_OF_TURNS = "mt-bench"
"""Where none is named and a question has several turns, of which Vicuna's prompts know nothing."""
FAMILY_OF_ONE = "mt-bench-single"
"""Where none is named and each answer is graded by itself."""
