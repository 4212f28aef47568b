"""Checkpoints whose tokenizers know the benchmarks' words, and helpers to ask a task of an engine.

A plugin (`pytest_plugins`) and not a conftest.py: mypy takes two files of that name for one module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.nano.seeded import build_checkpoint
from almost_eval.run.runner import Run
from almost_eval.tasks.base import Task
from almost_eval.types import SampleRecord


@pytest.fixture(scope="session")
def hub(data_root: Path) -> DataSource:
    """The real data sets as a data source."""
    return DataSource("hub", data_root)


def _benchmark_text(hub: DataSource) -> Iterator[str]:
    for row in hub.read("truthfulqa/truthful_qa", "multiple_choice", "validation")[:150]:
        yield row["question"]
        yield from row["mc2_targets"]["choices"]
    for subject in ("anatomy", "college_physics", "high_school_us_history"):
        for row in hub.read("cais/mmlu", subject, "test")[:40]:
            yield row["question"]
            yield from row["choices"]
    # So that " true", " A" and " B" are tokens of their own in every prompt.
    yield from ["The answer A or B or C or D is true or false.", "Response A", "Response B", "is true"] * 20


@pytest.fixture(scope="session")
def benchmark_checkpoint(tmp_path_factory: pytest.TempPathFactory, hub: DataSource) -> Path:
    """A random Llama of 4,096 tokens' context with a byte-level tokenizer trained on the benchmarks."""
    return build_checkpoint(
        tmp_path_factory.mktemp("benchmark") / "bpe",
        hidden_size=64,
        layers=2,
        vocab_size=2048,
        max_position_embeddings=4096,
        tokenizer_text=_benchmark_text(hub),
    )


@pytest.fixture(scope="session")
def sentencepiece_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, hub: DataSource, benchmark_checkpoint: Path
) -> Path:
    """The same weights with a LlamaTokenizer on a SentencePiece model."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("benchmark") / "sentencepiece"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).write_bytes((benchmark_checkpoint / name).read_bytes())
    text = folder.parent / "text.txt"
    text.write_text("\n".join(line for t in _benchmark_text(hub) for line in t.split("\n")), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=2000,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, SampleRecord]]:
    """`ask(task, engine)`: sample id -> record, with no run folder."""

    def answer(task: Task, engine: Any, only: Sequence[int] | None = None) -> dict[str, SampleRecord]:
        run = Run(task, engine)
        truncated = run.prepared.truncated if run.prepared else [0] * len(run.samples)
        chosen = range(len(run.samples)) if only is None else only
        return {
            run.samples[i].id: SampleRecord(run.samples[i], outputs, score, truncated[i])
            for i, outputs, score in run.answers(chosen)
        }

    return answer


@pytest.fixture(scope="session")
def lm_eval_samples(hub: DataSource) -> Callable[..., tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]:
    """`evaluate(checkpoint, tasks, shots, limit)`: lm-eval's own (samples by task, results by task), float32, CPU."""

    @cache
    def load(checkpoint: Path) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(checkpoint), dtype="float32", batch_size=8, device="cpu")

    def evaluate(
        checkpoint: Path, tasks: Sequence[Any], shots: int | None = None, limit: int | None = None, **options: Any
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
        from lm_eval import evaluator

        from almost_eval.tasks.harness import _manager, _quiet

        mmlu = any(str(name).startswith("mmlu_") for name in tasks)
        with pytest.MonkeyPatch.context() as patch, _quiet(), hub.serving_lm_eval():
            patch.setattr(evaluator, "add_env_info", lambda *_: None)  # starts pip and git: seconds
            patch.setattr(evaluator, "get_git_commit_hash", lambda: None)  # "fatal: ..." outside of a repository
            found = evaluator.simple_evaluate(
                model=load(checkpoint),
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                log_samples=True,
                task_manager=_manager("mmlu/default" if mmlu else "truthfulqa"),
                bootstrap_iters=0,
                **options,
            )
        return found["samples"], found["results"]

    return evaluate
