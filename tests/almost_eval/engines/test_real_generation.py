"""Real models after the official few-shot header: what prompts share is read once, and no text changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.types import Completion, Message
from almost_train.synthetic.prompt_sets import parse_demonstrations
from almost_train.synthetic.responses import STOPS

pytestmark = pytest.mark.real

QUESTIONS = (
    "How do I bake bread?",
    "What is rain?",
    "Why do cats purr, and do all of them, or only those that live with people?",
    "Who made the first bicycle, and when?",
)


def documents(data_root: Path, shots: int) -> list[str]:
    """A prompt for each question, behind the first demonstrations of the official header."""
    header = data_root / "github/naver-ai/ALMoST/assets/HHH_prompt.txt"
    demonstrations = parse_demonstrations(header.read_text(encoding="utf-8"))
    first = demonstrations.conversations[:shots]
    return [demonstrations.document((Message("user", question),), first) for question in QUESTIONS]


def texts_of_both(model: Path, prompts: list[str], params: SamplingParams) -> tuple[list[Completion], list[Completion]]:
    """All completions with one copy of the header, and those of transformers' `generate` alone."""
    shared = HFEngine(str(model), dtype="float32", device="cpu")
    plain = HFEngine(str(model), dtype="float32", device="cpu", share_prefixes=False)
    plain.__dict__["model"] = shared.model  # one load of the weights
    sides = [[one for rows in engine.generate(prompts, params) for one in rows] for engine in (shared, plain)]
    assert not shared.report.warnings
    return sides[0], sides[1]


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_texts_do_not_depend_on_sharing(real_models: Any, data_root: Path, top_p: float) -> None:
    params = SamplingParams(12, temperature=1.0, top_p=top_p, seed=3)
    shared, plain = texts_of_both(real_models.smollm2, documents(data_root, 3), params)
    assert shared == plain


def test_hundreds_of_tokens_do_not_depend_on_sharing(real_models: Any, data_root: Path) -> None:
    params = SamplingParams(96, temperature=1.0, top_p=0.9, n=2, seed=7, stop=STOPS)
    shared, plain = texts_of_both(real_models.smollm2, documents(data_root, 1), params)
    assert shared == plain
    assert sum(len(one.token_ids) for one in shared) > 300
    assert len({len(one.token_ids) for one in shared}) > 2  # rows end at different times


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_windows_stay_right_behind_a_header_longer_than_they_are(
    real_models: Any, data_root: Path, temperature: float
) -> None:
    """Gemma 3: windows of 512 tokens, and the header has 1,100; the whole vocabulary is drawn from."""
    prompts = documents(data_root, 3)[1:]
    shared, plain = texts_of_both(real_models.gemma, prompts, SamplingParams(24, temperature=temperature, seed=5))
    assert shared == plain
