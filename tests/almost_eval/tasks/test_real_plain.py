"""More numbers of a real model against plain transformers, a prompt at a time: few shots, all forms of TruthfulQA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_real_models import NATS_PER_TOKEN, Plain, largest_difference

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("mmlu", ("--subjects", "anatomy", "--shots", 5, "--limit", 2)),
        ("mmlu", ("--subjects", "anatomy", "--shots", 2, "--limit", 2, "--template", "tokenizer")),
        ("truthfulqa", ("--metrics", "mc1,mc2,mc1_true_prompt", "--limit", 1)),
    ],
)
def test_smollm2(
    almost_eval: Callable[..., Any],
    real_models: Any,
    data_root: Path,
    tmp_path: Path,
    task: str,
    options: tuple[object, ...],
) -> None:
    given = ("--dtype", "float32", "--device", "cpu", "--data-root", data_root, "--output", tmp_path / "run")
    outcome = almost_eval(task, "--model", real_models.smollm2, *options, *given)
    assert outcome.code in (0, 3), outcome.err
    count, worst = largest_difference(Plain(real_models.smollm2), tmp_path / "run")
    assert count >= 8
    assert worst < NATS_PER_TOKEN
