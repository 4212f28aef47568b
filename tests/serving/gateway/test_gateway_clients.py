"""Programs that people have, against the gateway before real vLLM: the openai SDK, lm-eval, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from fake_upstream import Served

from serving.gateway.app import GatewaySettings, create_app

KEY = "a-key"
OTTER: Any = [{"role": "user", "content": "What does the otter eat?"}]


@pytest.fixture(scope="module")
def url(policy_server: Any, reward_server: Any) -> Iterator[str]:
    settings = GatewaySettings(policy_url=policy_server.url, reward_url=reward_server.url, api_key=KEY)
    with Served.of(create_app(settings)) as served:
        yield f"{served.url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def test_sdk_chat(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["nano/almost"]
    answer = client.chat.completions.create(
        model="nano/almost", messages=OTTER, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.message.content
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [3] * answer.usage.completion_tokens
    several = client.chat.completions.create(model="nano/almost", messages=OTTER, max_tokens=8, n=3, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    text = client.completions.create(model="nano/almost", prompt="The otter eats", max_tokens=4, temperature=0)
    assert text.choices[0].text


def test_sdk_streams_what_it_answers(client: Any) -> None:
    asked: Any = {"model": "nano/almost", "messages": OTTER, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 3


def test_sdk_best_of(client: Any) -> None:
    extra = {"best_of": 4, "almost_candidates": True}
    asked: Any = {"model": "nano/almost", "messages": OTTER, "max_tokens": 16, "seed": 7, "extra_body": extra}
    answer = client.chat.completions.create(**asked, n=2, logprobs=True)
    best, second = answer.choices
    almost = answer.almost
    assert (almost["best_of"], len(almost["candidates"])) == (4, 4)
    assert almost["reward"] == max(almost["rewards"])
    assert almost["candidates"][almost["chosen"][1]]["text"] == second.message.content
    assert best.logprobs.content
    *chunks, last = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == best.message.content
    assert last.choices[0].finish_reason == best.finish_reason
    assert last.almost["rewards"] == pytest.approx(almost["rewards"], abs=1e-4)


def test_sdk_raises_its_own_errors(client: Any, url: str) -> None:
    import openai

    asked: Any = {"model": "nano/almost", "messages": OTTER}
    with pytest.raises(openai.BadRequestError, match="best_of is at most 16") as bad:
        client.chat.completions.create(**asked, extra_body={"best_of": 17})
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "best_of",
        "too_many_candidates",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(**asked, max_tokens=-1)
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=OTTER)
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=OTTER, extra_body={"best_of": 2})
    with pytest.raises(openai.AuthenticationError, match="no valid key"):
        openai.OpenAI(base_url=url, api_key="wrong").chat.completions.create(**asked)
    nobody = GatewaySettings(policy_url="http://127.0.0.1:9", reward_url="http://127.0.0.1:9", api_key=None)
    with Served.of(create_app(nobody)) as served:
        away = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="policy server is not reachable") as down:
            away.chat.completions.create(**asked, stream=True)
        assert down.value.status_code == 502


def test_curl(url: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")

    def run(path: str, *options: str) -> tuple[int, str]:
        words = [curl, "-sS", "-w", "\n%{http_code}", *options, f"{url}{path}"]
        out = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
        body, _, status = out.rpartition("\n")
        return int(status), body

    key, kind = ("-H", f"Authorization: Bearer {KEY}"), ("-H", "Content-Type: application/json")
    body = json.dumps({"messages": OTTER, "best_of": 4, "max_tokens": 8})
    status, out = run("/chat/completions", *key, *kind, "-d", body)
    assert (status, len(json.loads(out)["almost"]["rewards"])) == (200, 4)
    streamed = json.dumps({"messages": OTTER, "max_tokens": 8, "stream": True})
    status, out = run("/chat/completions", "-N", *key, *kind, "-d", streamed)
    assert status == 200
    assert out.startswith('data: {"id"')
    assert out.endswith("data: [DONE]\n\n")
    assert run("/models")[0] == 401
    status, out = run("/chat/completions", *key, "-d", body)  # curl's own content type is that of a form
    assert (status, json.loads(out)["error"]["code"]) == (415, "unsupported_media_type")


def test_lm_eval_scores_and_generates(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-likelihoods over HTTP are those that transformers gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from almost_eval.engines.hf import HFEngine
    from almost_eval.models.checkpoint import find_checkpoint
    from almost_eval.types import LoglikelihoodRequest

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    checkpoint = str(find_checkpoint("nano/almost").path)
    pairs = [("The otter eats", " fish"), ("The otter eats", " stones and fish"), ("A heron lives by", " the river")]
    model = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model="nano/almost",
        tokenizer=checkpoint,
        tokenizer_backend="huggingface",
        batch_size=2,
        max_length=2048,
    )
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]
    engine = HFEngine("nano/almost", dtype="float32", device="cpu")
    expected = engine.loglikelihood([LoglikelihoodRequest(context, (text,)) for context, text in pairs])
    assert found == pytest.approx([scores[0].logprob for scores in expected], abs=1e-3)

    chat = LocalChatCompletion(base_url=f"{url}/chat/completions", model="nano/almost")
    messages = json.dumps(OTTER)
    options = {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0}
    from lm_eval.models.api_models import JsonChatStr

    (text,) = chat.generate_until([Instance("generate_until", {}, (JsonChatStr(messages), options), 0)])
    assert text
