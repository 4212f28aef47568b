"""How large a run of the study is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Form:
    """Sizes, and settings of the recipe that differ from its own."""

    as_is_pairs: int
    second_pairs: int
    human_pairs: int | None
    """People's pairs to measure reward models on; None is all."""
    other_pairs: int
    """At most so many of each set for the as-is model and the reward models of variants."""
    hhh: int | None
    """Static HHH: pairs of each category; None is all."""
    truthfulqa: int | None
    mmlu: int
    """Questions of each subject."""
    held_out: int
    """Prompts of each of the two kinds."""
    answered: int
    """Of these, what the policies answer."""
    answer_tokens: int
    """Of a policy's answer to a held-out prompt, at most."""
    subjects: tuple[str, ...] = ()
    """Of MMLU; empty is all 57."""
    values: tuple[str, ...] = ()
    """As `almost-train run --set` takes them."""


FULL = Form(
    as_is_pairs=480,
    second_pairs=600,
    human_pairs=None,
    other_pairs=400,
    hhh=None,
    truthfulqa=None,
    mmlu=18,  # 1,026 questions
    held_out=100,
    answered=50,
    answer_tokens=128,
)
QUICK = Form(  # a quarter of an hour also on a CPU without AMX, which is slower
    as_is_pairs=16,
    second_pairs=16,
    human_pairs=16,
    other_pairs=16,
    hhh=4,
    truthfulqa=10,
    mmlu=9,
    held_out=10,
    answered=5,
    answer_tokens=48,
    # Few, since the questions of one share a header of five examples.
    subjects=("anatomy", "marketing", "sociology"),
    values=(
        "engine={engine: hf, dtype: bfloat16}",  # six starts of vLLM take longer than what it saves
        *("prompts.count=32", "responses.max_new_tokens=64"),
        *("as_is_reward.batch_size=8", "reward.batch_size=16", "sft.batch_size=8", "sft.epochs=1"),
        *(
            "self_play.candidates=2",
            "self_play.max_turns=1",
            "self_play.max_new_tokens=64",
            "self_play.user_max_new_tokens=32",
        ),
        *("rlsf.steps=2", "rlsf.batch_size=8", "rlsf.max_new_tokens=32", "rlsf.keep_every=0"),
        "evaluation=null",  # the study's own measurements say more
    ),
)
TINY = Form(
    as_is_pairs=12,
    second_pairs=8,
    human_pairs=4,
    other_pairs=4,
    hhh=1,
    truthfulqa=2,
    mmlu=1,
    held_out=2,
    answered=2,
    answer_tokens=16,
    values=(
        "engine={engine: hf, dtype: bfloat16}",
        *("prompts.count=6", "prompts.round_size=12", "prompts.max_new_tokens=32"),
        *("responses.max_new_tokens=24", "responses.rules=[]", "responses.min_characters=1"),
        *("as_is_reward.batch_size=4", "as_is_reward.micro_batch_size=2", "as_is_reward.max_length=256"),
        "comparisons.length_rule=false",
        *("reward.batch_size=4", "reward.micro_batch_size=2", "reward.max_length=256"),
        # An answer that is not finished is no demonstration: it gets as many tokens as a small model needs to end some.
        *("self_play.max_turns=1", "self_play.max_new_tokens=48", "self_play.shots=1"),
        *("sft.batch_size=2", "sft.micro_batch_size=2", "sft.epochs=1"),
        *("rlsf.steps=1", "rlsf.batch_size=4", "rlsf.micro_batch_size=2", "rlsf.max_new_tokens=12"),
        *("rlsf.keep_every=0", "rlsf.guard_window=0", "evaluation.limit=2", "evaluation.max_new_tokens=12"),
    ),
)
FORMS = {"full": FULL, "quick": QUICK, "tiny": TINY}
"""`tiny` is for a test: its figures mean nothing."""
