"""Reward models behind an address, of servers that are made to fail; and vLLM's rewards against transformers'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import SECRET, Answer, Endpoint, failed

from almost_eval.data.sources import find_data
from almost_eval.engines.build import EngineOptions
from almost_eval.errors import InputError, ModelError, RunError
from almost_eval.models.endpoints import KEYS
from almost_eval.rewards.base import RewardModel
from almost_eval.rewards.build import reward_model
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.rewards.http import PROBE, HTTPRewardModel
from almost_eval.rewards.vllm import VLLMRewardModel
from almost_eval.tasks.hhh import HHH
from almost_eval.types import Conversation, Message

Command = Callable[..., Any]


def dialogue(answer: str) -> Conversation:
    return (Message("user", "What is the capital of the valley?"), Message("assistant", answer))


CONVERSATIONS = [dialogue(text) for text in ("The town by the river.", "No.", "I do not know.", "No.")]


class Rewards:
    """A real reward model behind `/v1/rewards` or `/classify`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.model = HFRewardModel("nano/seeded-reward", device="cpu")

    def __call__(self, request: dict[str, Any]) -> Answer:
        if ("conversations" in request) != (self.kind == "rewards"):
            return failed(404, "Not Found")
        if self.kind == "rewards":
            rewards = self.model.score([_conversation(one) for one in request["conversations"]])
            return 200, {"object": "list", "model": "almost", "rewards": rewards}
        if "input" in request:
            ids = tuple(request["input"])
            [reward] = self.model._forward([ids])
        else:
            [reward] = self.model.score([_conversation(request["messages"])])
        value = reward if request.get("use_activation") is False else 1 / (1 + math.exp(-reward))
        return 200, {"model": "almost", "data": [{"index": 0, "probs": [value], "num_classes": 1}]}


def _conversation(messages: list[dict[str, str]]) -> Conversation:
    return tuple(Message(one["role"], one["content"]) for one in messages)


def served(endpoint: Endpoint, kind: str, **card: Any) -> None:
    endpoint.models = (200, {"object": "list", "data": [{"id": "almost", "object": "model", **card}]})
    endpoint.answer = Rewards(kind)


@pytest.fixture(scope="module")
def truth() -> list[float]:
    return HFRewardModel("nano/seeded-reward", device="cpu").score(CONVERSATIONS)


# --- over HTTP ---


@pytest.mark.parametrize("kind", ["rewards", "classify"])
def test_equal_to_transformers(endpoint: Endpoint, truth: list[float], kind: str) -> None:
    served(endpoint, kind)
    model = HTTPRewardModel(base_url=endpoint.url)
    assert isinstance(model, RewardModel)
    assert model.score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
    assert (model.kind, model.model) == (kind, "almost")
    assert model.template is None
    assert model.context_length is None
    asked = endpoint.requests[1 if kind == "rewards" else 3 :]
    assert len(asked) == 3  # a text that occurs twice is asked for once
    assert dict(model.stream(CONVERSATIONS, [1])) == {1: pytest.approx(truth[1], abs=1e-5)}
    assert model.settings()["route"] == kind


def test_what_is_sent_to_a_gateway(endpoint: Endpoint) -> None:
    served(endpoint, "rewards")
    HTTPRewardModel("almost", base_url=endpoint.url).score(CONVERSATIONS[:1])
    messages = [message.to_dict() for message in CONVERSATIONS[0]]
    assert endpoint.requests[-1] == {"model": "almost", "conversations": [messages]}


def test_token_ids_where_the_checkpoint_is_at_hand(endpoint: Endpoint, truth: list[float]) -> None:
    here = HFRewardModel("nano/seeded-reward", device="cpu")
    served(endpoint, "classify", root=str(here.checkpoint.path), max_model_len=2000)
    model = HTTPRewardModel(base_url=endpoint.url)
    assert model.score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
    assert next(r["input"] for r in endpoint.requests if "input" in r) in here.encode(CONVERSATIONS)
    assert model.context_length == 2000
    assert model.lengths(CONVERSATIONS) == here.lengths(CONVERSATIONS)
    assert model.render(CONVERSATIONS[0]) == here.render(CONVERSATIONS[0])
    assert model.checkpoint.weight_digest() == here.checkpoint.weight_digest()
    given = HTTPRewardModel(base_url=endpoint.url, max_length=64)
    given.check()
    assert given.context_length == 64


def sigmoid_only(request: dict[str, Any]) -> Answer:
    if "conversations" in request:
        return failed(404)
    return 200, {"model": "almost", "data": [{"probs": [0.7]}]}


def test_a_server_that_is_known_to_obey(endpoint: Endpoint) -> None:
    """From 0.31 on vLLM knows the field: a raw logit between 0 and 1 is no reason to doubt it."""
    card = {"id": "almost", "object": "model", "owned_by": "vllm"}
    endpoint.models = (200, {"object": "list", "data": [card], "version": "0.31.0"})  # /version, in the same answer
    endpoint.answer = sigmoid_only
    model = HTTPRewardModel(base_url=endpoint.url)
    model.check()
    assert model.settings()["server"] == {"kind": "vllm", "version": "0.31.0"}
    endpoint.models = (200, {"object": "list", "data": [card], "version": "0.11.2"})
    with pytest.raises(InputError, match="seem to be probabilities"):
        HTTPRewardModel(base_url=endpoint.url).check()


def two_labels(request: dict[str, Any]) -> Answer:
    return failed(404) if "conversations" in request else (200, {"model": "m", "data": [{"probs": [0.1, 0.9]}]})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sigmoid_only, r"its rewards seem to be probabilities \(0.700\), and raw logits cannot be asked of it"),
        (two_labels, "something else than one number for a conversation"),
        (
            lambda _: failed(404, "no such path"),
            "it knows neither /v1/rewards nor /classify, or no such model .no such",
        ),
        (lambda _: failed(400, "this gateway has no reward server"), "it answers 400: this gateway has no reward"),
        (lambda _: (200, {"rewards": []}), "something else than one number"),
        (lambda _: (200, b"<html>"), "something else than one number"),
        (lambda _: failed(401), "refuses the key"),
    ],
    ids=["sigmoid", "two labels", "404", "no reward server", "no rewards", "html", "key"],
)
def test_a_server_without_rewards(endpoint: Endpoint, answer: Callable[[Any], Answer], message: str) -> None:
    endpoint.answer = answer
    with pytest.raises(InputError, match=message) as caught:
        HTTPRewardModel(base_url=endpoint.url).check()
    assert "\n" not in str(caught.value)


def test_another_name_is_refused(endpoint: Endpoint) -> None:
    served(endpoint, "rewards")
    with pytest.raises(InputError, match="serves the reward model 'almost', not 'other'"):
        HTTPRewardModel("other", base_url=endpoint.url).check()


@pytest.mark.parametrize("option", [{"tokenizer": "nano/seeded-reward"}, {"max_length": 64}])
def test_a_gateway_takes_no_text_options(endpoint: Endpoint, option: dict[str, Any]) -> None:
    served(endpoint, "rewards")
    with pytest.raises(InputError, match="writes the conversations itself: leave out"):
        HTTPRewardModel(base_url=endpoint.url, **option).check()


def test_a_refused_conversation_is_told_and_a_failure_ends_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, truth: list[float]
) -> None:
    monkeypatch.setenv(KEYS[0], SECRET)
    served(endpoint, "rewards")
    rewards: Any = endpoint.answer

    def answer(request: dict[str, Any]) -> Answer:
        return failed(400, f"too long {SECRET}") if "No." in json.dumps(request) else rewards(request)

    endpoint.answer = answer
    model = HTTPRewardModel(base_url=endpoint.url, retries=1)
    scores = model.score(CONVERSATIONS)
    assert math.isnan(scores[1])
    assert scores[0] == pytest.approx(truth[0], abs=1e-5)
    assert model.warnings == ["the server refused 1 conversations, first: too long ***"]
    endpoint.answer = lambda _: failed(503, "reward model down", retry_after="0.01")
    with pytest.raises(RunError, match=r"still answers 503 after 2 tries .reward model down.; what was done is kept"):
        model.score(CONVERSATIONS)


def test_the_probe_is_a_conversation(endpoint: Endpoint) -> None:
    served(endpoint, "rewards")
    HTTPRewardModel(base_url=endpoint.url).check()
    assert endpoint.requests == [{"conversations": [[message.to_dict() for message in PROBE]]}]


def test_a_run_against_a_gateway(endpoint: Endpoint, almost_eval: Command, tmp_path: Path) -> None:
    served(endpoint, "rewards")
    given = ["hhh", "--protocol", "reward", "--data", "nano", "--limit", 2, "--json"]
    there = [*given, "--engine", "openai", "--base-url", endpoint.url, "--output", tmp_path / "there"]
    code, out, err = almost_eval(*there)
    assert (code, err) == (0, "")
    here = almost_eval(*given, "--model", "nano/seeded-reward", "--output", tmp_path / "here")
    assert json.loads(out)["metrics"] == json.loads(here.out)["metrics"]
    spec = json.loads((tmp_path / "there/spec.json").read_text())
    assert (spec["weight_digest"], spec["template"], spec["engine"]["route"]) == (None, None, "rewards")
    assert almost_eval(*there, "--dry-run").code == 0
    assert almost_eval("verify", tmp_path / "there", "--model", "almost").code == 0


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions("hf", base_url="http://x/v1"), "the reward model on 'hf' takes no base_url"),
        (EngineOptions("vllm", device="cuda"), "the reward model on 'vllm' takes no device"),
        (EngineOptions("openai", base_url="http://x/v1", dtype="float32"), "takes no dtype"),
        (EngineOptions("openai"), "needs an endpoint"),
        (EngineOptions("vllm", gpu_memory=1.5), "gpu_memory is a share above 0"),
        (EngineOptions("vllm", tensor_parallel_size=0), "must be 1 or more"),
        (EngineOptions("vllm", dtype="float23"), "did you mean 'float32'"),
    ],
)
def test_refused(options: EngineOptions, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match=message):
        reward_model("nano/seeded-reward", options)


def test_a_policy_is_no_reward_model() -> None:
    with pytest.raises(ModelError, match="holds a LlamaForCausalLM"):
        reward_model("nano/seeded", EngineOptions("vllm"))


# --- vLLM ---


@pytest.mark.slow
def test_vllm_equals_transformers_on_real_texts(data_root: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'almost-toolkit[vllm]'")
    hf, model = HFRewardModel("nano/reward", device="cpu"), VLLMRewardModel("nano/reward", dtype="float32")
    task = HHH("reward", find_data("hub", str(data_root)), limit=30)
    found = [one for sample in task.samples() for one in task.conversations(sample)]
    conversations = [c for c, n in zip(found, hf.lengths(found), strict=True) if n <= hf.context_length]
    assert len(conversations) >= 200
    assert model.encode(conversations) == hf.encode(conversations)
    assert list(model.stream(conversations, [])) == []
    assert "llm" not in vars(model)
    try:
        mine, theirs = model.score(conversations), hf.score(conversations)
        print(f"\n{len(mine)} texts, largest difference {max(map(abs, map(float.__sub__, mine, theirs))):.2g}")
        assert min(theirs) < -1  # no sigmoid gives that
        assert mine == pytest.approx(theirs, abs=1e-3)
        assert dict(model.stream(conversations, [3, 5])) == pytest.approx({3: theirs[3], 5: theirs[5]}, abs=1e-3)
        with pytest.raises(InputError, match="do not fit the context"):
            model.score([dialogue("the town by the river " * 2000)])
    finally:
        model.close()
