"""Best-of-N: on the fake, what is chosen and told; on real vLLM, that the rewards are the reward model's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_upstream import FakeUpstream, Served

from almost_eval.errors import InputError
from almost_eval.nano.seeded import train_tokenizer
from almost_eval.types import Message
from serving.gateway.app import GatewaySettings, create_app
from serving.gateway.candidates import independent_seed
from serving.gateway.rewards import renderer_of
from serving.vllm.launch import VLLMServer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
OTTER = [{"role": "user", "content": "What does the otter eat?"}]


@pytest.fixture
def fake() -> FakeUpstream:
    return FakeUpstream()


@pytest.fixture
def client(fake: FakeUpstream) -> Iterator[httpx.Client]:
    with ExitStack() as stack:
        upstream = stack.enter_context(fake.served())
        settings = GatewaySettings(policy_url=upstream.url, reward_url=upstream.url, api_key=None)
        served = stack.enter_context(Served.of(create_app(settings)))
        yield stack.enter_context(httpx.Client(base_url=served.url, timeout=20))


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post(CHAT, json={"messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_the_best_is_returned(client: httpx.Client, fake: FakeUpstream) -> None:
    """The fake's candidate i has reward i, and 7 is too long to be scored."""
    found = ask(client, best_of=7)
    assert found["almost"] == {
        "best_of": 7,
        "reward": 6.0,
        "rewards": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "chosen": [6],
        "unscored": [],
        "fallback": None,
        "note": None,
    }
    (choice,) = found["choices"]
    assert (choice["index"], choice["message"]["content"], choice["finish_reason"]) == (0, " answer 6", "stop")
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 14, "total_tokens": 17}  # all 7 were computed
    (candidates,) = [body for path, _, body in fake.seen if path == CHAT]
    assert candidates == {"messages": HELLO, "n": 7}
    # Scored without the whitespace around it, as in training.
    scored = sorted(body["messages"][-1]["content"] for path, _, body in fake.seen if path == "/classify")
    assert scored == [f"answer {i}" for i in range(7)]


def test_n_returns_the_top_n(client: httpx.Client) -> None:
    found = ask(client, best_of=6, n=3, almost_candidates=True)
    assert [choice["message"]["content"] for choice in found["choices"]] == [" answer 5", " answer 4", " answer 3"]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["almost"]["chosen"] == [5, 4, 3]
    assert found["almost"]["candidates"] == [
        {"index": i, "text": f" answer {i}", "reward": float(i), "finish_reason": "stop"} for i in range(6)
    ]


def test_what_cannot_be_scored_is_never_chosen(client: httpx.Client) -> None:
    almost = ask(client, best_of=10, n=9)["almost"]
    assert almost["rewards"][7] is None
    assert almost["chosen"] == [9, 8, 6, 5, 4, 3, 2, 1, 0]
    assert almost["unscored"] == [{"index": 7, "reason": "the prompt is too long"}]


@pytest.mark.parametrize("stream", [False, True])
def test_fewer_scored_candidates_than_answers_are_an_error(client: httpx.Client, stream: bool) -> None:
    """Ten answers are asked for, and candidate 7 has no reward: nine would be fewer, and nobody would be told."""
    body = {"messages": HELLO, "best_of": 10, "n": 10, "stream": stream}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "only 9 of the 10 candidates could be scored, and n is 10: the prompt is too long",
        "type": "invalid_request_error",
        "param": "n",
        "code": "too_few_scored",
    }
    found = ask(client, best_of=10, n=10, best_of_fallback=True)
    assert len(found["choices"]) == 10
    assert found["almost"]["fallback"].startswith("only 9 of the 10 candidates could be scored")


def test_best_of_one_is_an_answer_with_its_reward(client: httpx.Client) -> None:
    assert ask(client, best_of=1)["almost"]["rewards"] == [0.0]


def test_the_chosen_text_streams(client: httpx.Client) -> None:
    body = {"messages": HELLO, "best_of": 4, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post(CHAT, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: " answer 3", 1: " answer 2"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"] * 2
    assert [("almost" in chunk) for chunk in chunks] == [False] * 5 + [True]
    assert chunks[-1]["almost"]["chosen"] == [3, 2]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 8)


def test_one_request_scores_all_where_the_template_is_known(fake: FakeUpstream) -> None:
    with fake.served() as upstream:
        settings = GatewaySettings(
            policy_url=upstream.url, reward_url=upstream.url, reward_model="nano/reward", api_key=None
        )
        with Served.of(create_app(settings)) as served, httpx.Client(base_url=served.url, timeout=20) as client:
            assert ask(client, best_of=5)["almost"]["reward"] == 4.0
            (scored,) = [body for path, _, body in fake.seen if path == "/classify"]
            texts = [f"\n\nHuman: hello\n\nAssistant: answer {i}\n\n-----" for i in range(5)]
            assert scored == {"input": texts, "add_special_tokens": False}
            # One that is too long spoils the request for all: they are asked for one by one.
            almost = ask(client, best_of=9)["almost"]
            assert (almost["rewards"][7], almost["chosen"], len(almost["unscored"])) == (None, [8], 1)


def test_a_reward_model_that_is_none_is_refused_at_the_start() -> None:
    for name in ("nano/almost", "nano/rewrad"):
        with pytest.raises(InputError):
            create_app(GatewaySettings(policy_url="http://h", reward_url="http://h", reward_model=name))


# --- reward models that are encoders: their tokenizers put `[CLS] ... [SEP]` around a text ---

TURNS: list[list[dict[str, str]]] = [
    [*OTTER, {"role": "assistant", "content": answer}] for answer in ("Fish.", "The river is\n\nlong", "")
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a score head."""
    import torch
    import transformers
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer(["What does the otter eat? Fish, by the river."], vocab_size=300, model_max_length=128)
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    config = transformers.AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        num_labels=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations_of(turns: list[list[dict[str, str]]]) -> list[tuple[Message, ...]]:
    return [tuple(Message(**turn) for turn in dialogue) for dialogue in turns]


def test_a_text_is_encoded_as_the_reward_model_encodes_it(encoder: Path) -> None:
    from tokenizers import Tokenizer

    from almost_eval.rewards.hf import HFRewardModel

    for name in (str(encoder), "nano/reward"):
        model = HFRewardModel(name)
        fields = renderer_of(name).fields(TURNS)
        assert fields is not None
        assert fields["add_special_tokens"] is model.framed is (name != "nano/reward")
        tokenizer = Tokenizer.from_file(str(model.checkpoint.path / "tokenizer.json"))
        sent = [tokenizer.encode(text, add_special_tokens=model.framed).ids for text in fields["input"]]
        assert sent == model.encode(conversations_of(TURNS))


@pytest.mark.slow
def test_an_encoder_on_vllm(encoder: Path) -> None:
    from almost_eval.rewards.hf import HFRewardModel

    with VLLMServer("reward", str(encoder)) as server:
        server.wait_ready(timeout_s=300)
        settings = GatewaySettings(
            policy_url=server.url, reward_url=server.url, reward_model=str(encoder), api_key=None, reward_key=None
        )
        with Served.of(create_app(settings)) as served, httpx.Client(base_url=served.url, timeout=60) as client:
            found = client.post("/v1/rewards", json={"conversations": TURNS}).json()
    expected = HFRewardModel(str(encoder)).score(conversations_of(TURNS))
    assert found["rewards"] == pytest.approx(expected, abs=1e-3)


# --- real vLLM ---


@pytest.fixture(scope="module", params=[None, "nano/reward"], ids=["server renders", "gateway renders"])
def real(policy_server: Any, reward_server: Any, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    settings = GatewaySettings(
        policy_url=policy_server.url, reward_url=reward_server.url, reward_model=request.param, api_key=None
    )
    with Served.of(create_app(settings)) as served, httpx.Client(base_url=served.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def judge() -> Any:
    from almost_eval.rewards.hf import HFRewardModel

    return HFRewardModel("nano/reward")


def rewards_of(judge: Any, texts: list[str]) -> list[float]:
    turns = tuple(Message(**turn) for turn in OTTER)
    return list(judge.score([(*turns, Message("assistant", text.strip())) for text in texts]))


def test_rewards_are_the_reward_models_own(real: httpx.Client, judge: Any) -> None:
    body = {"messages": OTTER, "best_of": 8, "n": 8, "almost_candidates": True, "max_tokens": 24, "temperature": 1.5}
    found = real.post(CHAT, json=body).json()
    almost = found["almost"]
    texts = [candidate["text"] for candidate in almost["candidates"]]
    assert len(set(texts)) > 1
    assert almost["rewards"] == pytest.approx(rewards_of(judge, texts), abs=1e-3)
    ranked = [almost["rewards"][i] for i in almost["chosen"]]
    assert ranked == sorted(almost["rewards"], reverse=True)
    assert [choice["message"]["content"] for choice in found["choices"]] == [texts[i] for i in almost["chosen"]]
    assert found["usage"]["completion_tokens"] > max(map(len, (text.split() for text in texts)))


def test_a_seed_gives_the_same_candidates(real: httpx.Client) -> None:
    body = {"messages": OTTER, "best_of": 4, "seed": 3, "max_tokens": 12, "almost_candidates": True}
    one, other = (real.post(CHAT, json=body).json() for _ in range(2))
    assert one["almost"] == other["almost"]
    assert one["choices"] == other["choices"]
    plain = real.post(CHAT, json={"messages": OTTER, "n": 4, "seed": independent_seed(3), "max_tokens": 12}).json()
    drawn = [choice["message"]["content"] for choice in plain["choices"]]
    assert [candidate["text"] for candidate in one["almost"]["candidates"]] == drawn


def test_the_endpoint_of_rewards(real: httpx.Client, judge: Any) -> None:
    conversations = [
        [*OTTER, {"role": "assistant", "content": "The otter eats fish."}],
        [{"role": "system", "content": "Be kind."}, *OTTER, {"role": "assistant", "content": "No.\n\nWhy?"}],
        [*OTTER, {"role": "assistant", "content": "It eats"}, *OTTER, {"role": "assistant", "content": ""}],
        OTTER,
    ]
    found = real.post("/v1/rewards", json={"conversations": conversations}).json()
    expected = judge.score([tuple(Message(**turn) for turn in turns) for turns in conversations])
    assert found["rewards"] == pytest.approx(expected, abs=1e-3)
    assert found["model"] == "nano/reward"


def test_rewards_of_what_cannot_be_scored(real: httpx.Client) -> None:
    good = [*OTTER, {"role": "assistant", "content": "Fish."}]
    for bad in ([{"role": "user", "content": "otter " * 3000}], [{"role": "wizard", "content": "x"}]):
        answer = real.post("/v1/rewards", json={"conversations": [good, bad]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "conversations.1")
    answer = real.post("/v1/rewards", json={"conversations": [good], "model": "nano/other"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_candidates_too_long_for_the_reward_model(real: httpx.Client, policy_server: Any) -> None:
    """Both models have 2,048 positions: what fills the policy's leaves no room for the EOS that closes the answer."""
    words = {"prompt": " otter"}
    (*_, otter) = httpx.post(f"{policy_server.url}/tokenize", json=words).json()["tokens"]

    def length(count: int) -> int:
        messages = [{"role": "user", "content": "otter " * count}]
        return int(real.post(CHAT, json={"messages": messages, "max_tokens": 1}).json()["usage"]["prompt_tokens"])

    per_word = length(101) - length(100)
    count = (2040 - length(0)) // per_word
    long = [{"role": "user", "content": "otter " * count}]
    body = {"messages": long, "best_of": 2, "allowed_token_ids": [otter]}
    answer = real.post(CHAT, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "nothing_scored"), answer.text[:500]
    found = real.post(CHAT, json={**body, "best_of_fallback": True}).json()
    assert found["almost"]["fallback"].startswith("none of the 2 candidates could be scored")
