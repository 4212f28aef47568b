"""lm-eval's own API clients on the served model: `local-completions` scores and writes, its chat client writes.

Its log-likelihoods equal those of our engine in this process, on the documents of the nano world.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import find_data
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.nano.data import data_root as nano_root
from almost_eval.tasks.base import resolve_prompting
from almost_eval.tasks.mmlu import MMLU
from almost_eval.tasks.truthfulqa import TruthfulQA
from almost_eval.types import LoglikelihoodRequest
from serving.vllm.launch import VLLMServer

NATS = 1e-3
STOP = "\n\nHuman:"


@pytest.fixture(scope="module")
def hf() -> HFEngine:
    return HFEngine("nano/almost", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def completions(policy_server: VLLMServer, hf: HFEngine) -> Any:
    pytest.importorskip("tenacity", reason="lm-eval's API clients need tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{policy_server.url}/v1/completions",
        model=policy_server.model,
        tokenizer=str(hf.checkpoint.path),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        num_concurrent=4,
        max_length=2048,
    )


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def requests_of(task: Any) -> list[LoglikelihoodRequest]:
    return [request for sample in task.samples() for request in task.requests(sample, task.max_shots)]


@pytest.mark.parametrize("name", ["mmlu", "truthfulqa"])
def test_log_likelihoods_equal_our_engines(completions: Any, hf: HFEngine, name: str) -> None:
    data = find_data("nano", None)
    prompting = resolve_prompting(data, None, "auto", hf.tokenizer, own_prompts=True)
    task: Any = (
        MMLU([], 2, data, prompting, limit=2)
        if name == "mmlu"
        else TruthfulQA(["mc1", "mc2"], data, prompting, limit=3)
    )
    requests = requests_of(task)
    pairs = [(request.context, text) for request in requests for text in request.continuations]
    theirs = completions.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    mine = [score for scores in hf.loglikelihood(requests) for score in scores]
    assert len(mine) == len(theirs) >= 20
    assert [value for value, _ in theirs] == pytest.approx([score.logprob for score in mine], abs=NATS)
    assert [greedy for _, greedy in theirs] == [score.is_greedy for score in mine]


def test_a_whole_task_of_lm_eval(completions: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lm-eval's `simple_evaluate` on its own TruthfulQA, with the nano world's questions, against `almost-eval`."""
    import datasets.config
    from lm_eval import evaluator

    from almost_eval.run.runner import Run

    monkeypatch.chdir(nano_root())
    # To `datasets` every folder of this name and card is one: another test's questions may be in the tests' cache.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(evaluator, "get_git_commit_hash", lambda: None)  # "fatal: ..." outside of a repository
    results = evaluator.simple_evaluate(model=completions, tasks=["truthfulqa_mc1"], limit=8, bootstrap_iters=0)
    data = find_data("nano", None)
    engine = HFEngine("nano/almost", dtype="float32", device="cpu")
    prompting = resolve_prompting(data, "official", "auto", engine.tokenizer, own_prompts=True)
    run = Run(TruthfulQA(["mc1"], data, prompting, limit=8), engine)
    mine = [score.value for _, _, score in run.answers(range(len(run.samples)))]
    assert len(mine) == 8
    assert results["results"]["truthfulqa_mc1"]["acc,none"] == sum(value or 0 for value in mine) / 8


def test_greedy_texts_equal_our_engines(completions: Any, hf: HFEngine) -> None:
    prompts = [f"{STOP} {question}\n\nAssistant:" for question in ("where is the town?", "what is a cat?", "hello")]
    settings = {"until": [STOP], "max_gen_toks": 16, "temperature": 0}
    theirs = completions.generate_until(
        instances("generate_until", [(prompt, dict(settings)) for prompt in prompts]), disable_tqdm=True
    )
    mine = hf.generate(prompts, SamplingParams(max_new_tokens=16, stop=(STOP,)))
    assert theirs == [row[0].text for row in mine]


def test_chat_writes_what_the_template_asks_for(policy_server: VLLMServer, hf: HFEngine) -> None:
    pytest.importorskip("tenacity", reason="lm-eval's API clients need tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    chat = LocalChatCompletion(base_url=f"{policy_server.url}/v1/chat/completions", model=policy_server.model)
    questions = ["where is the town?", "what is a cat?"]
    asked = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(
                chat.apply_chat_template([{"role": "user", "content": question}]),
                {"until": [STOP], "max_gen_toks": 16, "temperature": 0},
            ),
            idx=0,
        )
        for question in questions
    ]
    theirs = chat.generate_until(asked, disable_tqdm=True)
    prompts = [f"{STOP} {question}\n\nAssistant:" for question in questions]
    mine = hf.generate(prompts, SamplingParams(max_new_tokens=16, stop=(STOP,)))
    assert [text.strip() for text in theirs] == [row[0].text.strip() for row in mine]
    with pytest.raises(NotImplementedError, match="not supported for chat completions"):
        chat.loglikelihood([])
