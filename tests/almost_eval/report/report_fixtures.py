"""Real runs of the built-in models, runs of the real size, and tabs of a real browser.

A plugin (`pytest_plugins`) and not a conftest.py: mypy takes two files of that name for one module.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.prompt_sets import load_prompt_set
from almost_eval.data.sources import DataSource
from almost_eval.files import write_json
from almost_eval.run.prompts import Prompt, SamplePrompts, write_prompts
from almost_eval.run.runner import summarise
from almost_eval.run.store import record_to_dict
from almost_eval.run.validity import check
from almost_eval.tasks.base import Prompting, Task
from almost_eval.types import Sample, SampleRecord


def evaluate(folder: Path, *arguments: object) -> Path:
    """`almost-eval ... --output folder` in this process."""
    import torch

    from almost_eval.cli.main import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for two
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["almost-eval", *map(str, arguments), "--output", str(folder)])
        with pytest.raises(SystemExit) as exit:
            main()
    torch.set_num_threads(threads)
    assert exit.value.code in (0, 3)
    return folder


@pytest.fixture(scope="session")
def nano_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs: two models on hhh, one of them on truthfulqa and mmlu, and a reward model."""
    folder = tmp_path_factory.mktemp("runs")
    evaluate(folder / "hhh", "hhh", "--limit", 12)
    evaluate(folder / "hhh-small", "hhh", "--limit", 12, "--model", "nano/vanilla-small")
    evaluate(folder / "hhh-reward", "hhh", "--limit", 6, "--protocol", "reward")
    evaluate(folder / "truthfulqa", "truthfulqa", "--limit", 6, "--metrics", "mc1,mc2,mc1_true_prompt")
    evaluate(folder / "mmlu", "mmlu", "--limit", 6)
    return folder


def write_run(
    folder: Path,
    records: Sequence[SampleRecord],
    *,
    task: str = "hhh",
    protocol: str = "choice",
    model: str = "m",
    headline: str = "accuracy",
    asked: Sequence[SamplePrompts] = (),
    spec: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    make: Task | None = None,
) -> Path:
    """A finished run folder with these lines; `make` computes its metrics, or they are one plain mean."""
    from almost_eval.stats import mean_metric

    folder.mkdir(parents=True)
    full: dict[str, Any] = {
        "schema": 1,
        "task": task,
        "task_version": 1,
        "protocol": protocol,
        "settings": {},
        "requires": "loglikelihood",
        "model_name": model,
        "architecture": "LlamaForCausalLM",
        "weight_digest": f"digest of {model}",
        "engine": {"name": "scripted", "dtype": "float32", "device": "cpu", "attention": "sdpa"},
        "template": None,
        "template_asked": False,
        "prompt_set": None,
        "prompt_ids_digest": "0" * 64,
        "data": {"source": "hub", "fingerprint": "f" * 64},
        "n_samples": len(records),
        "seed": 0,
        "versions": {"python": "3.11"},
        "command": ["almost-eval", task, "--model", model],
        "commit": None,
        **(spec or {}),
    }
    write_json(folder / "spec.json", full)
    engine = {"path": "plain", "warnings": []}
    if make is not None:
        content = summarise(make, records, check(records, len(records)), full, engine)
    else:
        metric = mean_metric([r.score.value for r in records], [r.sample.cluster for r in records]).to_dict()
        content = {
            "task": task,
            "protocol": protocol,
            "model": model,
            "headline": headline,
            "metrics": {headline: metric},
            "baselines": {},
            "details": {},
            "validity": {"passed": True, "reason": None, "checks": {}},
            "engine": engine,
            "provenance": {},
        }
    write_json(folder / "results.json", {**content, "timing": {"seconds": 1.0}, **(results or {})})
    lines = (json.dumps(record_to_dict(record), ensure_ascii=False) for record in records)
    (folder / "samples.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
    if asked:
        write_prompts(folder, asked)
    return folder


def synthesised(task: Task, seed: int) -> tuple[list[SampleRecord], list[SamplePrompts]]:
    """Every sample of a task, its real prompts, and random log-likelihoods for answers."""
    draw = random.Random(seed)
    records, asked = [], []
    for sample in task.samples():
        requests = task.requests(sample, task.max_shots)
        table = [[-12 * draw.random() - 1e-3 for _ in request.continuations] for request in requests]
        sizes = [[len(text.split()) for text in request.continuations] for request in requests]
        outputs = {
            "loglikelihoods": table,
            "is_greedy": [[False] * len(row) for row in table],
            "n_tokens": sizes,
        }
        records.append(SampleRecord(sample, outputs, task.score(sample, outputs)))
        asked.append(
            SamplePrompts(sample.id, sample.choices, tuple(Prompt(r.context, r.continuations) for r in requests))
        )
    return records, asked


@pytest.fixture(scope="session")
def whole_runs(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three real benchmarks whole: 14,042 + 817 + 221 samples, our wording of the prompts, random scores."""
    from almost_eval.tasks.hhh import HHH
    from almost_eval.tasks.mmlu import MMLU
    from almost_eval.tasks.truthfulqa import TruthfulQA

    data = DataSource("hub", data_root)
    prompting = Prompting(load_prompt_set("builtin", data))
    folder = tmp_path_factory.mktemp("whole")
    tasks: list[Task] = [
        MMLU([], 5, data, prompting),
        TruthfulQA(["mc1", "mc2"], data, prompting),
        HHH("choice", data, prompting),
    ]
    for task in tasks:
        records, asked = synthesised(task, seed=len(task.name))
        settings = task.settings()
        write_run(
            folder / task.name,
            records,
            task=task.name,
            protocol=task.protocol,
            model="random/scores",
            asked=asked,
            spec={"settings": settings, "data": {"source": "hub", "fingerprint": task.data_fingerprint()}},
            make=task,
        )
    return folder


def sample(id: str, *, group: str = "g", gold: int = 0, cluster: str = "", **metadata: Any) -> Sample:
    """A sample as a line stores it."""
    return Sample(id, (), (), gold, cluster or id, group, metadata=metadata)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(file)`: a tab with the page; whatever it asks of a network, says wrong or opens fails the test."""
    contexts, complaints = [], []

    def refuse(dialog: Any) -> None:
        complaints.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def go(file: Path, *, hash: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("dialog", refuse)
        page.on("pageerror", lambda error: complaints.append(f"error {error}"))
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith("file:") else None)
        page.goto(file.as_uri() + hash)
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []
