"""A real chat model behind vLLM's server, in the dtype that `auto` picks on this machine."""

from __future__ import annotations

from typing import Any

import pytest

from almost_eval.engines.hf import HFEngine
from almost_eval.engines.openai_loglikelihood import OpenAIScorer
from almost_eval.models.loading import cpu_has_bfloat16
from almost_eval.types import LoglikelihoodRequest
from serving.vllm.launch import VLLMServer, runs_on_cpu

pytestmark = [pytest.mark.real, pytest.mark.slow]

CAPITALS = LoglikelihoodRequest("The capital of France is", (" Paris.", " Rome.", " Berlin."))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_real_policy_answers_in_the_dtype_it_says(real_models: Any, dtype: str) -> None:
    pytest.importorskip("vllm", reason="serving needs vLLM: pip install 'almost-toolkit[vllm]'")
    import httpx

    if not (runs_on_cpu() and cpu_has_bfloat16()):
        pytest.skip("auto is bfloat16 on a CPU that computes in it alone")
    options = [] if dtype == "auto" else ["--dtype", dtype]
    half = dtype == "auto"
    with VLLMServer("policy", str(real_models.smollm2), options=[*options, "--max-model-len", "512"]) as server:
        chosen = dict(zip(server.vllm.arguments, server.vllm.arguments[1:], strict=False))["--dtype"]
        assert chosen == ("bfloat16" if half else "float32")
        assert ("bfloat16" in server.vllm.note) == half
        server.wait_ready(timeout_s=300)
        question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
        body = {"model": server.model, "messages": [question], "temperature": 0, "max_tokens": 24}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        scorer = OpenAIScorer(server.model, base_url=f"{server.url}/v1", tokenizer=str(real_models.smollm2))
        (served,) = scorer.loglikelihood([CAPITALS])
    assert "Paris" in reply["choices"][0]["message"]["content"]
    (exact,) = HFEngine(str(real_models.smollm2), dtype="float32").loglikelihood([CAPITALS])
    off = [abs(a.logprob - b.logprob) for a, b in zip(served, exact, strict=True)]
    assert max(off) < (0.5 if half else 1e-3)
    assert half == (max(off) > 1e-3)  # a server that ignored the dtype would be exact, or rough, in both
