"""Answers that the limit of new tokens cut are counted in the table and on the page of every run that generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.nano.data import data_root
from almost_eval.run.runner import Run
from almost_eval.run.store import read_samples
from almost_eval.tasks.base import resolve_prompting
from almost_eval.tasks.harness import Harness

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def page_of(run: str, almost_eval: Command) -> str:
    assert almost_eval("report", run, "-o", "page.html").code == 0
    return Path("page.html").read_text(encoding="utf-8")


def test_vicuna(almost_eval: Command) -> None:
    code, out, err = almost_eval("vicuna", "--limit", 4, "--max-new-tokens", 6, "--output", "run")
    assert (code, err) == (0, "")
    page = page_of("run", almost_eval)
    for name in ("nano/almost", "nano/vanilla-medium"):
        lines = Path(f"run/answers/{name.replace('/', '_')}.jsonl").read_text().splitlines()
        cut = sum(json.loads(line)["metadata"]["finish_reason"] == "length" for line in lines)
        assert cut > 0
        said = f"{cut} of 4 answers of {name} were cut at the limit of new tokens"
        assert f"warning: {said}" in out
        assert said in page


@pytest.mark.slow
def test_a_task_of_the_harness_that_generates(almost_eval: Command) -> None:
    task = Harness(["truthfulqa_gen"], DataSource("nano", data_root()), limit=6)
    task.tasks["truthfulqa_gen"].set_config("generation_kwargs", {"until": ["?"], "max_gen_toks": 4}, update=True)
    engine = HFEngine("nano/vanilla-medium", device="cpu")
    task.prompting = resolve_prompting(task.data, None, "auto", engine.tokenizer, own_prompts=True)
    Run(task, engine).execute(Path("run"))
    cut = [record.outputs["finish_reasons"][0] for record in read_samples(Path("run"))].count("length")
    assert cut > 0
    said = f"{cut} of 6 answers were cut at the limit of new tokens"
    assert f"warning: {said}" in almost_eval("report", "run").out
    assert said in page_of("run", almost_eval)
