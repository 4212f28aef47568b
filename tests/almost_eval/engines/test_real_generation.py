"""A real model after the official few-shot header: what the batch shares is read once, and no text changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.types import Message
from almost_train.synthetic.prompt_sets import parse_demonstrations

pytestmark = pytest.mark.real

QUESTIONS = ("How do I bake bread?", "What is rain?", "Why do cats purr?", "Who made the first bicycle, and when?")


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_texts_do_not_depend_on_sharing(real_models: Any, data_root: Path, top_p: float) -> None:
    header = data_root / "github/naver-ai/ALMoST/assets/HHH_prompt.txt"
    shots = parse_demonstrations(header.read_text(encoding="utf-8"))
    prompts = [shots.document((Message("user", question),), shots.conversations[:3]) for question in QUESTIONS]
    params = SamplingParams(12, temperature=1.0, top_p=top_p, seed=3)
    shared = HFEngine(str(real_models.smollm2), dtype="float32", device="cpu")
    plain = HFEngine(str(real_models.smollm2), dtype="float32", device="cpu", share_prefixes=False)
    plain.__dict__["model"] = shared.model  # one load of the weights
    assert shared.generate(prompts, params) == plain.generate(prompts, params)
    assert not shared.report.warnings
