"""A run that goes on with a higher `--max-tokens`: what was cut without a verdict is requested again, and nothing else.

The bound on tokens decides no verdict that was read, so a review that has one stays as it is. The spec takes the new
bound, and `max_tokens_before` lists those that went before; each line says with which bound its review came about.
A lower bound, or other words of the prompt, are another run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import AlmostError
from almost_eval.judge.api.endpoint import THOUGHT_ONLY
from almost_eval.judge.api.parameters import MAX_COMPLETION_TOKENS, MAX_TOKENS
from almost_eval.run.store import read_samples, read_spec
from almost_eval.types import JSONObject, SampleRecord

if TYPE_CHECKING:
    from almost_eval.judge.prompts import JudgePrompts

BEFORE = "max_tokens_before"
"""In a judge's spec: the bounds of earlier commands, the first of them first."""


def amended(stored: JSONObject, now: JSONObject, prompts: JudgePrompts) -> tuple[JSONObject, JSONObject]:
    """The stored spec and the present one, made equal in the bound where it was raised; else as they are."""
    was, judge = stored["settings"]["judge"], now["settings"]["judge"]
    before, old, new = list(was.get(BEFORE, ())), was.get(MAX_TOKENS), judge.get(MAX_TOKENS)
    same_words = isinstance(old, int) and replace(prompts, max_tokens=old).digest == was["prompt_set"]["digest"]
    if isinstance(old, int) and isinstance(new, int) and new > old and same_words:
        before.append(old)
        stored = _with_judge(stored, was | {key: judge[key] for key in (MAX_TOKENS, "prompt_set")} | {BEFORE: before})
        if "prompt_set" in now:
            stored["prompt_set"] = now["prompt_set"]
    return stored, _with_judge(now, judge | {BEFORE: before}) if before else now


def was_cut(record: SampleRecord, max_tokens: int) -> bool:
    """Whether a review ended at a lower bound than this one before it had a verdict."""
    outputs, sent = record.outputs, record.outputs.get("parameters") or {}
    if record.score.reason == THOUGHT_ONLY:
        bound = outputs.get(MAX_TOKENS)
    elif record.score.reason is not None and outputs.get("finish_reason") == "length":
        bound = sent.get(MAX_COMPLETION_TOKENS, sent.get(MAX_TOKENS))
    else:
        return False
    return isinstance(bound, int) and bound < max_tokens


def kept_lines(folder: Path | None, now: JSONObject, prompts: JudgePrompts) -> Sequence[SampleRecord]:
    """Lines of a folder that a command with this spec would go on in with a higher bound; none where it would not."""
    if folder is None or not (folder / "spec.json").is_file():
        return []
    try:
        stored = read_spec(folder)
        after, _ = amended(stored, now, prompts)
        return [] if after == stored and BEFORE not in after["settings"]["judge"] else list(read_samples(folder))
    except (AlmostError, LookupError, TypeError):
        return []  # the run itself says what is wrong with the folder


def _with_judge(spec: JSONObject, judge: JSONObject) -> JSONObject:
    return spec | {"settings": spec["settings"] | {"judge": judge}}
