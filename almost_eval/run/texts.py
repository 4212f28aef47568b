"""What a model wrote, as it is stored and scored: thoughts beside the answer, and never in its place.

`Task.reasoning` says what becomes of a thought (see `models.reasoning`): `strip` scores the answer alone, `keep` the
text as it is, `refuse` nothing. A thought that has no end has no answer after it: the sample is unscored, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from almost_eval.models.reasoning import Reasoning, opens_thought, split_reasoning
from almost_eval.tasks.base import ReasoningRule, Task
from almost_eval.types import Completion, Outputs, Sample, Score

CUT = "thought_cut"
"""Why a sample is unscored: its thought was cut before an answer."""
REFUSED = "thought"
"""Why a sample is unscored: it holds a thought, and `--reasoning refuse`."""


def text_outputs(task: Task, prompt: str, completions: Sequence[Completion]) -> Outputs:
    """Stored form of a sample's texts; `reasoning` and `thought_cut` are there where there is a thought."""
    parts = [split_completion(task.reasoning, prompt, completion) for completion in completions]
    outputs: Outputs = {
        "completions": [part.answer for part in parts],
        "finish_reasons": [completion.finish_reason for completion in completions],
    }
    if any(part.thought is not None for part in parts):
        outputs |= {"reasoning": [part.thought for part in parts], CUT: [part.is_cut for part in parts]}
    return outputs


def score_texts(task: Task, sample: Sample, outputs: Outputs) -> Score:
    """The task's score of stored outputs, of any kind; none where thoughts leave nothing to score."""
    thoughts = outputs.get("reasoning", ())
    if task.reasoning == "refuse" and any(thought is not None for thought in thoughts):
        return Score(None, REFUSED)
    if any(outputs.get(CUT, ())):
        return Score(None, CUT)
    return task.score(sample, outputs)


def unscored_reason(rule: ReasoningRule, part: Reasoning) -> str | None:
    """Why a text is not scored; None where it is."""
    if rule == "refuse" and part.thought is not None:
        return REFUSED
    return CUT if part.is_cut else None


def split_completion(rule: ReasoningRule, prompt: str, completion: Completion) -> Reasoning:
    """The parts of one text; an endpoint may have delivered the thought in a field of its own."""
    text, own = completion.text, completion.reasoning or None
    if rule == "keep":
        return Reasoning(text, own, False)
    if own is not None:
        part = split_reasoning(text)
        thought = own if part.thought is None else f"{own}\n\n{part.thought}"
        is_cut = part.is_cut or (not part.answer.strip() and completion.finish_reason == "length")
        return Reasoning(part.answer, thought, is_cut)
    return split_reasoning(text, opened=opens_thought(prompt))
