"""Real language models: each number of a run against plain transformers, one prompt at a time, and against lm-eval.

Nothing of ours has a part in the plain side: it reads `prompts.jsonl`, which is what the run says that the model read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_parity import check_truthfulqa

from almost_eval.data.sources import DataSource

pytest_plugins = ["benchmark_fixtures"]
pytestmark = pytest.mark.real

NATS_PER_TOKEN = 1e-4


class Plain:
    """A checkpoint in transformers, float32, a text at a time with no padding and no shared prefix."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def score(self, context: str, continuation: str, *, special_tokens: bool = True) -> tuple[float, int]:
        """(log p(continuation | context) in nats, its tokens); both texts are encoded together."""
        import torch

        ids = self.tokenizer(context + continuation, add_special_tokens=special_tokens)["input_ids"]
        # The continuation begins at the first token that the context alone, without its last spaces, does not have.
        alone = self.tokenizer(context.rstrip(), add_special_tokens=special_tokens)["input_ids"]
        start = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone))
        n = len(ids) - start
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids[:-1]]), logits_to_keep=n).logits[0]  # (n, vocabulary)
        logprobs = logits.log_softmax(-1)[range(n), ids[start:]]  # (n,), nats
        return float(logprobs.sum()), n


def scored_prompts(run: Path) -> Iterator[tuple[str, str, float]]:
    """(context, continuation, log-likelihood) of everything that a run scored."""
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    outputs = {row["id"]: row["outputs"] for row in map(json.loads, lines)}
    pieces: dict[str | None, str] = {None: ""}
    for entry in map(json.loads, (run / "prompts.jsonl").read_text(encoding="utf-8").splitlines()):
        if "piece" in entry:
            pieces[entry["piece"]] = entry["text"]
            continue
        for prompt, values in zip(entry["prompts"], outputs[entry["id"]]["loglikelihoods"], strict=True):
            context = pieces[prompt["piece"]] + prompt["text"]
            for continuation, value in zip(prompt["continuations"], values, strict=True):
                yield context, continuation, value


def largest_difference(plain: Plain, run: Path) -> tuple[int, float]:
    """(continuations, nats per token between a run and plain transformers)."""
    differences = []
    for context, continuation, value in scored_prompts(run):
        expected, n = plain.score(context, continuation)
        differences.append(abs(expected - value) / n)
    return len(differences), max(differences)


@pytest.fixture(scope="module")
def smollm2(real_models: Any) -> Plain:
    return Plain(real_models.smollm2)


@pytest.fixture(scope="module")
def gemma(real_models: Any) -> Plain:
    return Plain(real_models.gemma)


@pytest.fixture
def evaluate(almost_eval: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`evaluate(task, model, *options)`: the folder of that run in float32."""

    def run(task: str, model: Path, *options: object) -> Path:
        given = ("--dtype", "float32", "--device", "cpu", "--output", tmp_path / task)
        outcome = almost_eval(task, "--model", model, *options, *given)
        assert outcome.code in (0, 3), outcome.err
        return tmp_path / task

    return run


@pytest.mark.parametrize("protocol", ["choice", "likelihood"])
def test_smollm2_on_hhh(smollm2: Plain, evaluate: Callable[..., Path], real_models: Any, protocol: str) -> None:
    """With its ChatML template: the built-in world's pairs, which need no data from elsewhere."""
    options = ("--protocol", protocol, "--data", "nano", "--prompt-set", "builtin", "--limit", 1)
    run = evaluate("hhh", real_models.smollm2, *options)
    assert "<|im_start|>user" in next(scored_prompts(run))[0]
    count, worst = largest_difference(smollm2, run)
    assert count == (16 if protocol == "choice" else 8)  # four categories, both answers, for a choice in both orders
    assert worst < NATS_PER_TOKEN


@pytest.mark.parametrize("protocol", ["choice", "likelihood"])
def test_smollm2_on_the_real_hhh(
    smollm2: Plain, evaluate: Callable[..., Path], real_models: Any, data_root: Path, protocol: str
) -> None:
    options = ("--protocol", protocol, "--data-root", data_root, "--prompt-set", "official", "--limit", 1)
    count, worst = largest_difference(smollm2, evaluate("hhh", real_models.smollm2, *options))
    assert count >= 8
    assert worst < NATS_PER_TOKEN


def test_smollm2_on_truthfulqa_against_lm_eval(
    ask: Callable[..., Any], lm_eval_samples: Callable[..., Any], hub: DataSource, real_models: Any
) -> None:
    check_truthfulqa(ask, lm_eval_samples, hub, real_models.smollm2, 3)


def test_gemma_on_truthfulqa_against_lm_eval(
    ask: Callable[..., Any], lm_eval_samples: Callable[..., Any], hub: DataSource, real_models: Any
) -> None:
    check_truthfulqa(ask, lm_eval_samples, hub, real_models.gemma, 2)


def test_gemma_reads_bos_once(gemma: Plain, evaluate: Callable[..., Path], real_models: Any, data_root: Path) -> None:
    """Without BOS this model scores noise, and with two of them something else: a run is right with exactly one."""
    run = evaluate("truthfulqa", real_models.gemma, "--data-root", data_root, "--limit", 1)
    _, worst = largest_difference(gemma, run)
    assert worst < NATS_PER_TOKEN
    context, continuation, value = next(scored_prompts(run))
    assert not context.startswith("<bos>")  # the tokenizer puts it there
    without, n = gemma.score(context, continuation, special_tokens=False)
    twice, _ = gemma.score("<bos>" + context, continuation)
    assert abs(without - value) / n > 0.1
    assert math.isfinite(twice)
    assert abs(twice - value) / n > NATS_PER_TOKEN


def test_gemma_past_its_window(gemma: Plain, evaluate: Callable[..., Path], real_models: Any, data_root: Path) -> None:
    """Prompts of more than 512 tokens, which most of its layers do not see whole."""
    options = ("--subjects", "high_school_us_history", "--shots", 2, "--data-root", data_root, "--limit", 1)
    run = evaluate("mmlu", real_models.gemma, *options)
    assert all(len(gemma.tokenizer(context)["input_ids"]) > 520 for context, _, _ in scored_prompts(run))
    count, worst = largest_difference(gemma, run)
    assert count == 4
    assert worst < NATS_PER_TOKEN
