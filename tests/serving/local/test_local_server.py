"""The server of `almost-chat --model`: what it answers is what the engines say, whoever else is asking."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fake_upstream import Served

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.models.chat import special_tokens
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from serving.chat.launch import Models, with_transformers
from serving.local.generation import Cancelled, RowText, Turnstile, TurnStreamer, generate_in_turns
from serving.local.policy import Policy
from serving.local.server import LocalServer
from serving.local.settings import LocalModels

QUESTION = "What does the hamster eat?"
ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def engine() -> HFEngine:
    return HFEngine("nano/almost")


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    with with_transformers({name: name for name in ("nano/almost", "nano/seeded")}, "nano/reward") as running:
        running.wait_ready(timeout_s=120)
        yield running


@pytest.fixture(scope="module")
def client(models: Models) -> Iterator[httpx.Client]:
    endpoint = models.endpoint()
    headers = {"Authorization": f"Bearer {endpoint.key}"}
    with httpx.Client(base_url=endpoint.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


def ask(client: httpx.Client, **more: Any) -> dict[str, Any]:
    answer = client.post("/chat/completions", json={"messages": ASK, "max_tokens": 40, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: httpx.Client, **more: Any) -> Iterator[dict[str, Any]]:
    body = {"messages": ASK, "max_tokens": 40, "stream": True, **more}
    with client.stream("POST", "/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def engine_says(engine: HFEngine, **params: Any) -> list[str]:
    prompt = Policy("p", engine).prompt((Message("user", QUESTION),))
    (completions,) = engine.generate([prompt], SamplingParams(max_new_tokens=40, stop=("\n\nHuman:",), **params))
    return [done.text.strip() for done in completions]


# --- the same as the engine ---


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "n": 3}])
def test_answers_are_the_engines(client: httpx.Client, engine: HFEngine, params: dict[str, Any]) -> None:
    answer = ask(client, **params)
    assert [choice["message"]["content"] for choice in answer["choices"]] == engine_says(engine, **params)
    assert answer["model"] == "nano/almost"
    assert answer["usage"]["completion_tokens"] > 0


def test_a_stream_says_the_same_token_by_token(client: httpx.Client, engine: HFEngine) -> None:
    params = {"temperature": 1.0, "seed": 5, "n": 3}
    chunks = list(stream(client, stream_options={"include_usage": True}, **params))
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == engine_says(engine, **params)
    assert len(chunks) > 20
    assert chunks[-1]["usage"]["completion_tokens"] == ask(client, **params)["usage"]["completion_tokens"]


def test_each_model_answers_under_its_name(client: httpx.Client, engine: HFEngine) -> None:
    listed = client.get("/models").json()["data"]
    assert [one["id"] for one in listed] == ["nano/almost", "nano/seeded"]
    params = {"temperature": 1.0, "seed": 2, "n": 3}
    answers = [choice["message"]["content"] for choice in ask(client, model="nano/seeded", **params)["choices"]]
    assert answers == engine_says(HFEngine("nano/seeded"), **params) != engine_says(engine, **params)
    unknown = client.post("/chat/completions", json={"messages": ASK, "model": "nano/other"})
    assert unknown.status_code == 404
    assert "nano/seeded" in unknown.json()["error"]["message"]


def test_rewards_are_the_reward_models(client: httpx.Client) -> None:
    conversations = [[*ASK, {"role": "assistant", "content": text}] for text in ("Otters eat fish.", "No idea", "x y")]
    found = client.post("/rewards", json={"conversations": conversations}).json()["rewards"]
    model = HFRewardModel("nano/reward")
    expected = model.score([tuple(Message(m["role"], m["content"]) for m in one) for one in conversations])
    assert found == pytest.approx(expected, abs=1e-4)


def test_best_of_returns_the_best_in_the_gateways_form(client: httpx.Client) -> None:
    answer = ask(client, best_of=4, almost_candidates=True, temperature=1.0, seed=3)
    almost = answer["almost"]
    assert almost["best_of"] == len(almost["candidates"]) == 4
    best = max(almost["candidates"], key=lambda one: one["reward"])
    assert answer["choices"][0]["message"]["content"] == best["text"]
    assert almost["reward"] == best["reward"]


# --- limits and refusals ---


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"logprobs": True}, 400, "logprobs"),
        ({"temperature": -1}, 400, "temperature"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "robot"),
        ({"messages": [{"role": "user", "content": "otter " * 3000}]}, 400, "context of 2048 tokens is full"),
        ({"max_tokens": 5000}, 400, "context of 2048 tokens is full"),
        ({"best_of": 99}, 400, "at most 16"),
    ],
)
def test_what_cannot_be_answered_is_told(client: httpx.Client, fields: dict[str, Any], status: int, words: str) -> None:
    answer = client.post("/chat/completions", json={"messages": ASK, **fields})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_full_context_has_its_code(client: httpx.Client) -> None:
    answer = client.post("/chat/completions", json={"messages": [{"role": "user", "content": "otter " * 3000}]})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_nobody_without_the_key(client: httpx.Client) -> None:
    assert httpx.get(f"{client.base_url}models", trust_env=False).status_code == 401


def test_a_stop_string_never_shows(client: httpx.Client) -> None:
    whole = ask(client, temperature=0)["choices"][0]["message"]["content"]
    stop = whole.split()[2]
    texts = "".join(
        choice["delta"].get("content", "")
        for chunk in stream(client, temperature=0, stop=stop)
        for choice in chunk["choices"]
    )
    assert texts == whole[: whole.index(stop)].strip()


def test_the_models_process_ends_with_its_parent() -> None:
    running = with_transformers({"nano/almost": "nano/almost"}, None)
    running.start()
    running.wait_ready(timeout_s=120)
    assert running._process is not None
    assert running._process.stdin is not None
    running._process.stdin.close()  # what the kernel does for a parent that was killed
    assert running._process.wait(10) is not None
    running.stop()


# --- several visitors ---


def test_a_short_answer_does_not_wait_for_a_long_one(client: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        begun, at_half = threading.Event(), []

        def long() -> int:
            """Pieces of a long answer: random weights go on until the limit."""
            body = {"model": "nano/seeded", "temperature": 1.0, "max_tokens": 400, "n": 4, "seed": 1}
            for count, _ in enumerate(stream(client, **body), 1):
                begun.set()
                if count == 600:
                    at_half.append(short_done.is_set())
            return count

        short_done = threading.Event()
        answer = pool.submit(long)
        assert begun.wait(60)
        ask(client, temperature=0, max_tokens=4)
        short_done.set()
        assert answer.result() > 1000
    assert at_half == [True]


def test_answers_at_once_are_the_answers_alone(client: httpx.Client) -> None:
    alone = [ask(client, temperature=1.0, seed=seed)["choices"][0]["message"] for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda seed: ask(client, temperature=1.0, seed=seed), range(6)))
    assert [answer["choices"][0]["message"] for answer in together] == alone


def test_a_cancelled_generation_stops_at_the_next_token(engine: HFEngine) -> None:
    cancelled, told = threading.Event(), []
    prompt = Policy("p", engine).prompt((Message("user", QUESTION),))

    def on_text(number: int, text: str) -> None:
        told.append(text)
        cancelled.set()

    params = SamplingParams(max_new_tokens=200, temperature=1.0)
    with pytest.raises(Cancelled):
        generate_in_turns(engine, prompt, params, Turnstile(), on_text=on_text, cancelled=cancelled)
    assert len(told) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(stream: bool) -> None:
    def at_work() -> bool:
        return any(thread.name == "generate" for thread in threading.enumerate())

    server = LocalServer.load(LocalModels({"nano/seeded": "nano/seeded"}))  # goes on until the limit
    body = {"messages": ASK, "max_tokens": 1500, "n": 4, "stream": stream}
    with Served.of(server.app("k")) as served:
        headers = {"Authorization": "Bearer k"}
        with httpx.Client(base_url=served.url, headers=headers, timeout=1.0 if not stream else 30.0) as client:
            if stream:
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    assert all(next(lines) is not None for _ in range(30))
                    assert at_work()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/chat/completions", json=body)
        end = time.monotonic() + 10
        while at_work() and time.monotonic() < end:
            time.sleep(0.02)
        assert not at_work()


def test_turns_go_round() -> None:
    turnstile, order, first = Turnstile(), [], threading.Event()

    def work(name: str) -> None:
        with turnstile:
            first.wait(5)
            for _ in range(3):
                order.append(name)
                turnstile.pass_on()

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    first.set()
    for thread in threads:
        thread.join(5)
    assert "".join(order) == "abcabcabc"


def test_text_that_may_become_a_stop_string_is_held_back(engine: HFEngine) -> None:
    tokenizer = engine.tokenizer
    assert special_tokens(tokenizer)
    text = RowText(tokenizer, frozenset(), ("fish and",))
    ids = tokenizer.encode("Otters eat fish and more", add_special_tokens=False)
    assert "".join(text.add(token) for token in ids) == "Otters eat"


def test_half_a_character_is_held_back(engine: HFEngine) -> None:
    words = "Otters «eat» fish 🦦 and mòre\n\n—  so"
    text = RowText(engine.tokenizer)
    told = [text.add(token) for token in engine.tokenizer.encode(words, add_special_tokens=False)]
    assert "".join(told) == words
    assert "\ufffd" not in "".join(told)
    assert len([piece for piece in told if piece]) > 5


def test_rows_that_come_again_are_told_once(engine: HFEngine) -> None:
    """Out of memory after two tokens: the batch of two comes again as two batches of one."""
    import torch

    ids = torch.tensor(
        [engine.tokenizer.encode(text, add_special_tokens=False)[:4] for text in ("one two six", "a b c d")]
    )
    told = ["", ""]

    def on_text(number: int, text: str) -> None:
        told[number] += text

    turnstile = Turnstile()
    rows = [RowText(engine.tokenizer) for _ in told]
    streamer = TurnStreamer(rows, on_text, turnstile, threading.Event())
    prompts = torch.zeros((2, 7), dtype=torch.long)
    with turnstile:
        streamer.put(prompts)
        for step in (0, 1):
            streamer.put(ids[:, step])
        for row in (0, 1):
            streamer.put(prompts[:1])
            for step in range(ids.shape[1]):
                streamer.put(ids[row : row + 1, step])
            streamer.end()
    assert told == [engine.tokenizer.decode(row) for row in ids]


# --- what no honest client sends ---


def test_a_text_that_no_context_holds_is_refused_unread(client: httpx.Client) -> None:
    """To count its tokens took up to a minute, in the thread that answers everybody."""
    endless = [{"role": "user", "content": "a" * 3_000_000}]
    began = time.monotonic()
    answer = client.post("/chat/completions", json={"messages": endless})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    conversation = [*endless, {"role": "assistant", "content": "b"}]
    scored = client.post("/rewards", json={"conversations": [conversation]})
    assert (scored.status_code, scored.json()["error"]["code"]) == (400, "nothing_scored")
    assert time.monotonic() - began < 5


def test_a_long_stop_string_costs_no_time(engine: HFEngine) -> None:
    """Each token was compared with each beginning of it: 1 MB of it held the model for minutes."""
    text = RowText(engine.tokenizer, frozenset(), ("x" * 300_000, "fish " + "y" * 300_000))
    began = time.process_time()
    told = [text.add(token) for token in engine.tokenizer.encode("Otters eat fish and", add_special_tokens=False)]
    assert "".join(told) == "Otters eat fish and"
    assert time.process_time() - began < 2


def test_a_temperature_that_is_none_to_a_float_is_greedy(client: httpx.Client) -> None:
    """Divided by 1e-320 all logits are infinite, and the answer was empty."""
    texts = [ask(client, temperature=value)["choices"][0]["message"]["content"] for value in (0, 1e-320, 1e-40)]
    assert texts == [texts[0]] * 3
    assert texts[0]


@pytest.mark.parametrize("content", [rb"a\ud83d", b"a\xed\xa0\xbd"])
def test_half_a_character_is_refused(client: httpx.Client, content: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": "%s"}]}' % content
    answer = client.post("/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    whole = "\\ud83e\\udda6 \ud55c".encode()
    body = b'{"max_tokens": 2, "messages": [{"role": "user", "content": "%s"}]}' % whole
    answer = client.post("/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
