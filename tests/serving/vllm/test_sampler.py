"""What is drawn by `almost-serve policy`, against the same server with vLLM's own sampler."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from serving.vllm.launch import VLLMServer, runs_on_cpu

QUESTION = "Why is the sky blue? Answer in one sentence."
SAMPLING = [
    {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    for temperature, top_p, top_k in itertools.product((0.7, 1.3), (0.5, 0.9, 1.0), (0, 40))
]


def answers(checkpoint: str, *options: str) -> list[str]:
    """Texts with seeds, one after another: in a larger batch rounding differs, whatever the sampler."""
    import httpx

    with VLLMServer("policy", checkpoint, options=["--max-model-len", "512", *options]) as server:
        server.wait_ready(timeout_s=300)
        texts = []
        for seed, sampling in enumerate(SAMPLING):
            body: dict[str, Any] = {"model": server.model, "messages": [{"role": "user", "content": QUESTION}]}
            body |= {"max_tokens": 24, "seed": seed, "ignore_eos": True, "stop": [], **sampling}
            reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
            assert reply.status_code == 200, reply.text
            texts.append(reply.json()["choices"][0]["message"]["content"])
        assert ("without sorting" in " ".join(server.last_lines(400))) == ("--worker-cls" not in options)
        assert "sampler stays" not in " ".join(server.last_lines(400))
        return texts


def same_answers(checkpoint: str) -> None:
    pytest.importorskip("vllm", reason="serving needs vLLM: pip install 'almost-toolkit[vllm]'")
    if not runs_on_cpu():
        pytest.skip("the sampler is changed on a CPU alone")
    ours = answers(checkpoint)
    assert ours == answers(checkpoint, "--worker-cls", "auto")
    assert len(set(ours)) > len(SAMPLING) // 2


@pytest.mark.slow
def test_seeds_give_the_texts_of_vllms_own_sampler() -> None:
    same_answers("nano/vanilla-small")


@pytest.mark.slow
@pytest.mark.real
def test_seeds_give_the_texts_of_vllms_own_sampler_in_bfloat16(real_models: Any) -> None:
    """Coarse logits, of which many are equal, and 49,152 tokens."""
    same_answers(str(real_models.smollm2))
