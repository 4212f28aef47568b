"""An exam that the built-in models pass: without one the alignment tax has nothing to lose."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from almost_eval.api import evaluate
from almost_eval.cli.main import cli
from almost_eval.files import read_json

CHANCE = 0.25


@pytest.mark.parametrize("shots", [0, 5])
def test_the_large_vanilla_model_knows_the_world(shots: int, tmp_path: Path) -> None:
    run = evaluate("nano/vanilla-large", "mmlu", output=tmp_path / "run", words=True, shots=shots)
    accuracy = run.results["metrics"]["accuracy"]
    assert accuracy["n"] == 120
    assert accuracy["ci95"][0] > CHANCE + 0.15


@pytest.mark.parametrize(("flags", "words"), [([], True), (["--letters"], False)])
def test_the_tax_of_nano_models_is_asked_by_words(flags: list[str], words: bool, tmp_path: Path) -> None:
    command = ["tax", "--before", "nano/sft", "--after", "nano/almost", "--tasks", "mmlu", "--n-prompts", "2"]
    result = CliRunner().invoke(cli, [*command, "--limit", "8", *flags, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = read_json(tmp_path / "tax.json")
    assert report["words"] is words
    before = report["policies"][0]["measures"]["mmlu"]["value"]
    assert (before > 0.7) is words
