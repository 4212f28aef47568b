"""A stage that samples keeps the dtype in which it began, wherever it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from almost_eval.data.sources import find_data
from almost_eval.engines.base import GenerationEngine
from almost_eval.engines.build import EngineOptions, generation_engine
from almost_eval.errors import RunError
from almost_eval.models import loading
from almost_train.common.stage import StageChanged
from almost_train.synthetic.prompts import PromptSettings, synthesize_prompts


def test_mining_is_not_gone_on_with_in_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LARGE", 1000)

    def mine(rounds: int, dtype: str = "auto") -> None:
        def engine_for(model: str) -> GenerationEngine:
            return generation_engine(model, EngineOptions(device="cpu", dtype=dtype))

        settings = PromptSettings(prompt_set="nano", count=10_000, max_rounds=rounds, round_size=2, max_new_tokens=4)
        data = find_data("nano", None)
        synthesize_prompts(settings, "nano/vanilla-small", tmp_path / "s", data=data, engine_for=engine_for)

    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
    with pytest.raises(RunError, match="after 1 rounds"):
        mine(1)
    stored = json.loads((tmp_path / "s" / "stage.json").read_text(encoding="utf-8"))
    assert stored["pinned"] == {"dtype of model": "bfloat16"}
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)  # another machine
    with pytest.raises(StageChanged, match="dtype of model was 'bfloat16', is 'float32'"):
        mine(2)
    with pytest.raises(RunError, match="after 2 rounds"):
        mine(2, "bfloat16")
