"""Direct preference optimisation (arXiv 2305.18290): offline on comparisons, online on answers that a reward model
judges.

May use `common`, `reward`, `sft`, `rlsf` and all of `almost_eval`. Start with `run`; `loss` holds the arithmetic,
`online` the pairs that the policy itself writes.
"""
