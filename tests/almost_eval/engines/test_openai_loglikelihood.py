"""Log-likelihoods over HTTP against a server that answers with a real model's log-probabilities, in several dialects.

vLLM's own server is in tests/serving/test_served_scoring.py; what it cannot be made to do (to lack what is needed, to
fail on order) is done here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_endpoint import SECRET, Answer, Endpoint, failed

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.openai_loglikelihood import PROBE, OpenAIScorer
from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest
from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.models.endpoints import KEYS
from almost_eval.types import LoglikelihoodRequest

REQUESTS = [
    LoglikelihoodRequest("Human: is the cat on the mat?\n\nAssistant: The answer is", (" A", " B")),
    LoglikelihoodRequest("The cat", (" sat on the mat", " sat on the door and 42 numbers", " sat")),
    LoglikelihoodRequest("The cat", (" sat on the mat", "!")),
    LoglikelihoodRequest("The dog sat", tuple(f" {i}" for i in range(40))),
    LoglikelihoodRequest("", ("hello", "numbers")),
]
OWN = {"logprob_token_ids", "prompt_logprobs", "return_tokens_as_token_ids"}
"""Fields of vLLM's that OpenAI's protocol has not."""
CONTEXT = 256


class Model:
    """A checkpoint behind `/v1/completions`. `dialect` is `vllm`, `echo` (no fields but OpenAI's) or `strict` (400)."""

    def __init__(self, path: Path, dialect: str) -> None:
        self.engine = HFEngine(str(path), device="cpu")
        self.dialect = dialect

    def __call__(self, request: dict[str, Any]) -> Answer:
        if self.dialect == "strict" and (unknown := OWN & request.keys()):
            return failed(400, f"extra fields not permitted: {sorted(unknown)}")
        ids = request["prompt"]
        with torch.inference_mode():
            rows = self.engine.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)  # (T, vocabulary)
        own = self.dialect == "vllm"
        sampled = int(rows[-1].argmax())
        shown = [*ids, sampled] if request.get("echo") else [sampled]
        values: list[float | None] = [None] if request.get("echo") else []
        tops: list[dict[str, float] | None] = [None] if request.get("echo") else []
        start = 1 if request.get("echo") else len(ids)
        for at, token in enumerate([*ids, sampled][start:], start):
            row = rows[at - 1]
            named = request.get("logprob_token_ids") if own and at == len(ids) else None
            top = [token, *(named or row.topk(request["logprobs"]).indices.tolist())]
            values.append(float(row[token]))
            tops.append({self.name(i, request): float(row[i]) for i in top})
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.engine.tokenizer.decode(shown),
            "finish_reason": "length",
            "logprobs": {
                "tokens": [self.name(i, request) for i in shown],
                "token_logprobs": values,
                "top_logprobs": tops,
            },
        }
        if own and request.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = [None] + [
                {str(i): {"logprob": float(row[i]), "rank": int((row > row[i]).sum()) + 1}}
                for i, row in zip(ids[1:], rows, strict=False)
            ]
        return 200, {"object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def name(self, token: int, request: dict[str, Any]) -> str:
        if self.dialect == "vllm" and request.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        return str(self.engine.tokenizer.convert_ids_to_tokens(token))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama-gqa")


@pytest.fixture
def endpoint(endpoint: Endpoint, checkpoint: Path) -> Endpoint:
    """The one of all tests, with a model behind it."""
    tell(endpoint, max_model_len=CONTEXT, root=str(checkpoint))
    endpoint.answer = Model(checkpoint, "vllm")
    return endpoint


def tell(endpoint: Endpoint, **card: Any) -> None:
    endpoint.models = (200, {"object": "list", "data": [{"id": "almost", "object": "model", **card}]})


def scorer(endpoint: Endpoint, **options: Any) -> OpenAIScorer:
    return OpenAIScorer("almost", base_url=endpoint.url, **options)


# --- right answers ---


@pytest.mark.parametrize(("dialect", "route"), [("vllm", "ids"), ("echo", "echo"), ("strict", "echo")])
def test_equal_to_transformers(endpoint: Endpoint, checkpoint: Path, dialect: str, route: str) -> None:
    endpoint.answer = Model(checkpoint, dialect)
    engine = scorer(endpoint, max_length=40)
    requests = [
        *REQUESTS,
        LoglikelihoodRequest("", ("The cat sat on the mat, and the dog sat by the door. " * 5,), True),
    ]
    hf = HFEngine(str(checkpoint), device="cpu", max_length=40)
    ours, theirs = engine.loglikelihood(requests), hf.loglikelihood(requests)
    assert engine.route == route
    for mine, other in zip(ours, theirs, strict=True):
        assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in other], abs=1e-4)
        assert [(s.is_greedy, s.n_tokens) for s in mine] == [(s.is_greedy, s.n_tokens) for s in other]
    assert len(ours[-1]) > 2  # windows

    # What the model itself would say is greedy, and nothing else.
    [prefix] = hf.encoder.encode_texts(["The cat"])
    said = np.array(hf.generate(["The cat"], SamplingParams(max_new_tokens=3))[0][0].token_ids, dtype=np.int32)
    changed = said.copy()
    changed[0] += 1
    pieces = [EncodedContinuation(prefix, ids) for ids in (said, said[:1], changed)]
    [(_, scores)] = engine.stream([EncodedRequest(REQUESTS[0], tuple(pieces))])
    assert [score.is_greedy for score in scores] == [True, True, False]


def test_what_is_asked(endpoint: Endpoint) -> None:
    engine = scorer(endpoint)
    encoded = engine.encode([*REQUESTS, LoglikelihoodRequest("The dog", (" the", " a", "!", " the"))])
    assert all(len(c.scored) == 1 for c in encoded[-1].continuations)
    engine.check_scores()
    engine.check_scores()
    assert len(endpoint.requests) == 1  # one tiny request finds out what the server can do
    assert endpoint.requests[0]["prompt"] == engine.encoder.encode_texts([PROBE])[0].tolist()
    endpoint.requests.clear()
    some = dict(engine.stream(encoded, wanted=[3, 5]))
    assert sorted(some) == [3, 5]
    for request in endpoint.requests:
        assert request["logprobs"] == len(request["logprob_token_ids"])
        assert (request["max_tokens"], request["temperature"]) == (1, 0)
        assert "echo" not in request
    # Labels of one token share a request, and one without `prompt_logprobs` reads the server's cache.
    [labels] = [r for r in endpoint.requests if "prompt_logprobs" not in r]
    assert labels["prompt"] == encoded[-1].continuations[0].prefix.tolist()
    assert labels["logprob_token_ids"] == sorted({int(c.scored[0]) for c in encoded[-1].continuations})
    assert engine.report.tokens_computed == sum(len(r["prompt"]) for r in endpoint.requests)


def test_minus_infinity_is_no_number(endpoint: Endpoint, checkpoint: Path) -> None:
    model = Model(checkpoint, "vllm")

    def answer(request: dict[str, Any]) -> Answer:
        status, body = model(request)[:2]
        top = body["choices"][0]["logprobs"]["top_logprobs"][-1]
        top.update(dict.fromkeys(top, -9999.0))  # as vLLM's server writes it
        return status, body

    endpoint.answer = answer
    [[score, _]] = scorer(endpoint).loglikelihood(REQUESTS[:1])
    assert score.logprob == -math.inf


def test_no_more_requests_at_a_time_than_allowed(endpoint: Endpoint) -> None:
    assert len(scorer(endpoint, concurrency=2).loglikelihood(REQUESTS)) == len(REQUESTS)
    assert endpoint.most_at_once <= 2


# --- what is refused before the start ---


def no_logprobs(model: Model) -> Callable[[dict[str, Any]], Answer]:
    def answer(request: dict[str, Any]) -> Answer:
        status, body = model(request)[:2]
        body["choices"][0] |= {"logprobs": None, "prompt_logprobs": None}
        return status, body

    return answer


def no_echo(model: Model) -> Callable[[dict[str, Any]], Answer]:
    def answer(request: dict[str, Any]) -> Answer:
        status, body = model(request)[:2]
        logprobs = body["choices"][0]["logprobs"]
        body["choices"][0]["logprobs"] = {key: value[-1:] for key, value in logprobs.items()}
        return status, body

    return answer


def retokenized(model: Model) -> Callable[[dict[str, Any]], Answer]:
    def answer(request: dict[str, Any]) -> Answer:
        status, body = model(request)[:2]
        body["usage"]["prompt_tokens"] += 1  # a BOS of its own
        return status, body

    return answer


def other_tokenizer(model: Model) -> Callable[[dict[str, Any]], Answer]:
    def answer(request: dict[str, Any]) -> Answer:
        status, body = model(request)[:2]
        body["choices"][0]["text"] = "qwrt plk"
        return status, body

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (no_logprobs, "cannot score answers: it tells no log-probabilities of a prompt's tokens; serve the model with"),
        (no_echo, "it tells no log-probabilities of a prompt's tokens"),
        (retokenized, "it read .* tokens where .* were sent, so it takes no token ids as they are"),
        (other_tokenizer, "reads the ids of .* as 'qwrt plk': the tokenizer is not the served model's"),
        (lambda _: lambda _: failed(400, "prompt must be a string"), "it answers 400: prompt must be a string"),
        (lambda _: lambda _: (200, {"choices": []}), "is no completion with log-probabilities"),
        (lambda _: lambda _: (200, b"<html>"), "is no completion with log-probabilities"),
        (lambda _: lambda _: failed(404), "has no model 'almost' at /completions"),
    ],
    ids=["no logprobs", "no echo", "retokenized", "other tokenizer", "400", "empty", "html", "404"],
)
def test_a_server_that_cannot_score(
    endpoint: Endpoint, checkpoint: Path, answer: Callable[[Model], Any], message: str
) -> None:
    endpoint.answer = answer(Model(checkpoint, "echo"))
    engine = scorer(endpoint)
    with pytest.raises(InputError, match=message) as caught:
        engine.check_scores()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        engine.loglikelihood(REQUESTS)


def test_lengths(endpoint: Endpoint) -> None:
    engine = scorer(endpoint)
    assert engine.context_length == CONTEXT - 1  # the server counts a sampled token too
    with pytest.raises(InputError, match=f"does not fit the context of {CONTEXT - 1}"):
        engine.loglikelihood([LoglikelihoodRequest("a b " * CONTEXT, (" c",))])
    assert len(endpoint.requests) == 1  # the probe
    with pytest.raises(InputError, match=f"--max-length 300 is beyond what .* can score, {CONTEXT - 1} tokens"):
        scorer(endpoint, max_length=300).context_length  # noqa: B018
    with pytest.raises(InputError, match="max length is 0"):
        scorer(endpoint, max_length=0)
    assert scorer(endpoint, max_length=64).context_length == 64


def test_a_server_that_does_not_tell_its_length(endpoint: Endpoint, checkpoint: Path) -> None:
    tell(endpoint, root=str(checkpoint))
    engine = scorer(endpoint)
    assert engine.context_length is None
    assert engine.loglikelihood(REQUESTS[:1])
    with pytest.raises(InputError, match=r"does not tell its context length.*give --max-length"):
        engine.encode([LoglikelihoodRequest("", ("a b c",), rolling=True)])


# --- tokenizer, weights, spec ---


def test_where_the_tokenizer_comes_from(endpoint: Endpoint, checkpoint: Path) -> None:
    tell(endpoint)
    with pytest.raises(InputError, match=r"does not say where its tokenizer is, .* give --tokenizer"):
        scorer(endpoint).loglikelihood(REQUESTS)
    assert scorer(endpoint, tokenizer=str(checkpoint)).loglikelihood(REQUESTS)
    with pytest.raises(InputError, match="has no tokenizer that transformers can read"):
        scorer(endpoint, tokenizer=str(checkpoint.parent)).loglikelihood(REQUESTS)
    tell(endpoint, root="/no/such/folder")
    with pytest.raises(InputError, match="give --tokenizer"):
        scorer(endpoint).loglikelihood(REQUESTS)
    endpoint.models = (200, {"object": "list", "data": [{"id": str(checkpoint), "object": "model"}]})
    assert OpenAIScorer(str(checkpoint), base_url=endpoint.url).loglikelihood(REQUESTS)


def test_weights_are_told_where_they_are_known(endpoint: Endpoint, checkpoint: Path) -> None:
    here = scorer(endpoint)
    assert here.checkpoint.weight_digest() == HFEngine(str(checkpoint)).checkpoint.weight_digest()
    assert here.checkpoint.architecture == "LlamaForCausalLM"
    here = scorer(endpoint)
    here._local = False  # another machine's folder of the same name would prove nothing
    assert (here.checkpoint.weight_digest(), here.checkpoint.architecture) == (None, "")
    tell(endpoint, root=str(checkpoint.parent))
    assert scorer(endpoint).checkpoint.weight_digest() is None


def test_the_spec_holds_what_is_told_and_no_secret(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS[0], SECRET)
    address = endpoint.url.replace("http://", f"http://someone:{SECRET}@")
    engine = OpenAIScorer("almost", base_url=address)
    engine.check_scores()
    told = engine.settings()
    assert told == {
        "name": "openai", "base_url": endpoint.url, "model": "almost", "server": {"kind": None, "version": None},
        "dtype": None, "device": None, "context_length": CONTEXT - 1, "route": "ids",
    }  # fmt: skip
    shown = [json.dumps(told), repr(engine)]
    for status in (400, 401, 404, 500):
        endpoint.answer = lambda _, status=status: failed(status, f"key {SECRET}", retry_after="0.01")
        with pytest.raises(AlmostError) as caught:
            engine.loglikelihood(REQUESTS)
        shown.append(str(caught.value))
    assert SECRET not in "".join(shown)


# --- failures on the way ---


def test_a_failure_keeps_what_was_done(endpoint: Endpoint, checkpoint: Path) -> None:
    model, served = Model(checkpoint, "vllm"), 0

    def answer(request: dict[str, Any]) -> Answer:
        nonlocal served
        served += 1
        return model(request) if served < 5 else failed(500, "engine died", retry_after="0.01")

    endpoint.answer = answer
    engine = scorer(endpoint, concurrency=1, retries=1)
    done: list[Any] = []
    with pytest.raises(RunError, match=r"still answers 500 after 2 tries .engine died.; what was done is kept"):
        done.extend(engine.stream(engine.encode(REQUESTS)))
    assert 0 < len(done) < len(REQUESTS)


def test_an_answer_without_log_probabilities_on_the_way(endpoint: Endpoint, checkpoint: Path) -> None:
    engine = scorer(endpoint)
    engine.check_scores()
    endpoint.answer = no_logprobs(Model(checkpoint, "vllm"))
    with pytest.raises(RunError, match="something else than the log-probabilities"):
        engine.loglikelihood(REQUESTS)


def test_bos_of_a_template_is_not_sent_as_text(endpoint: Endpoint, checkpoint: Path) -> None:
    """The server's tokenizer would write a second one: what the template began with BOS goes as token ids."""
    engine = scorer(endpoint)
    texts = ["The cat", "<s>The cat"]
    assert engine.sent_prompt(texts[0]) == texts[0]
    assert engine.sent_prompt(texts[1]) == HFEngine(str(checkpoint)).encoder.encode_texts([texts[0]])[0].tolist()
    endpoint.requests.clear()
    endpoint.answer = lambda request: (200, {"choices": [{"text": " sat", "finish_reason": "stop"}]})
    engine.generate([texts[1]], SamplingParams(max_new_tokens=1))
    assert endpoint.requests[-1]["prompt"] == engine.sent_prompt(texts[1])
