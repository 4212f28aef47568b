"""vLLM's server as our launcher starts it: two real servers, started once for all tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.errors import InputError
from almost_eval.models.chat import encode_text, parse_dialogue
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Conversation, Message
from serving.vllm.launch import VLLMServer

OTTER = [{"role": "user", "content": "What does the otter eat?"}]
COMMAND = str(Path(sys.executable).with_name("almost-serve"))


def post(server: VLLMServer, path: str, **body: Any) -> tuple[Any, dict[str, str]]:
    request = urllib.request.Request(
        server.url + path, json.dumps({"model": server.model, **body}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer), {name.lower(): value for name, value in answer.headers.items()}


def chat(server: VLLMServer, **body: Any) -> tuple[str, dict[str, str]]:
    answer, headers = post(server, "/v1/chat/completions", messages=OTTER, temperature=0, max_tokens=16, **body)
    return answer["choices"][0]["message"]["content"], headers


# --- the policy ---


def test_the_policy_is_served_under_its_name(policy_server: VLLMServer) -> None:
    with urllib.request.urlopen(f"{policy_server.url}/v1/models", timeout=10) as answer:
        [model] = json.load(answer)["data"]
    assert (model["id"], model["max_model_len"]) == ("nano/almost", 2048)
    assert policy_server.url.startswith("http://127.0.0.1:")
    assert policy_server.is_healthy()


def test_a_chat_is_encoded_as_everywhere_else(policy_server: VLLMServer) -> None:
    messages = (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello."),
        Message("user", "?"),
    )
    answer, _ = post(policy_server, "/tokenize", messages=[message.to_dict() for message in messages])
    from almost_eval.models.loading import load_tokenizer

    text = policy_server.served.template.render(messages, add_generation_prompt=True)
    assert answer["tokens"] == encode_text(load_tokenizer(policy_server.served.checkpoint), text)


def test_default_stop_strings_act_and_say_so(policy_server: VLLMServer) -> None:
    text, headers = chat(policy_server)
    assert json.loads(headers["almost-default-stop"]) == ["\n\nHuman:", "\n\nAssistant:"]
    assert "eats" in text
    cut, named = chat(policy_server, stop=["eats"])
    assert cut == text.split("eats")[0]
    assert "almost-default-stop" not in named
    assert "almost-default-stop" not in chat(policy_server, stop=[])[1]
    # A chat whose answer is forced to go on into the next turn ends before it.
    body = {"messages": OTTER, "max_tokens": 24, "ignore_eos": True, "seed": 1, "temperature": 0,
            "structured_outputs": {"regex": " It eats\\.\n\nHuman: Thanks"}}  # fmt: skip
    answer, _ = post(policy_server, "/v1/chat/completions", **body)
    assert answer["choices"][0]["message"]["content"] == " It eats."
    assert answer["choices"][0]["stop_reason"] == "\n\nHuman:"
    _, headers = post(policy_server, "/v1/completions", prompt="The otter", max_tokens=2)
    assert "almost-default-stop" not in headers


def test_a_broken_body_is_the_servers_to_judge(policy_server: VLLMServer) -> None:
    address = f"{policy_server.url}/v1/chat/completions"
    for body in (b"{", b"[]", b'{"messages": 3}'):
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        assert caught.value.code in (400, 422)
        caught.value.close()


def test_the_openai_client(policy_server: VLLMServer) -> None:
    import openai

    with openai.OpenAI(base_url=f"{policy_server.url}/v1", api_key="none", max_retries=0) as client:
        settings: dict[str, Any] = {"model": policy_server.model, "messages": OTTER, "max_tokens": 16, "seed": 5}
        first, second = (client.chat.completions.create(**settings, n=3, temperature=1.0) for _ in range(2))
        assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
        whole = client.chat.completions.create(**settings, temperature=0).choices[0].message.content
        parts = client.chat.completions.create(**settings, temperature=0, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
        with pytest.raises(openai.NotFoundError, match="gpt-none"):
            client.chat.completions.create(**{**settings, "model": "gpt-none"})


# --- the reward model ---


@pytest.fixture(scope="module")
def hhh(data_root: Path) -> list[Conversation]:
    """200 real dialogues, each with an answer; every kind of Static HHH is among them."""
    rows = [
        row
        for part in ("harmless", "helpful", "honest", "other")
        for row in DataSource("hub", data_root).read("HuggingFaceH4/hhh_alignment", part, "test")
    ]
    conversations = [
        (*parse_dialogue(row["input"]), Message("assistant", answer))
        for row in rows
        for answer in row["targets"]["choices"]
    ]
    lengths = HFRewardModel("nano/reward").lengths(conversations)
    fitting = [c for c, length in zip(conversations, lengths, strict=True) if length <= 2048]  # all but a few
    return fitting[:: len(fitting) // 200][:200]


@pytest.fixture(scope="module")
def transformers_rewards(hhh: list[Conversation]) -> list[float]:
    return HFRewardModel("nano/reward").score(hhh)


def rewards(server: VLLMServer, **body: Any) -> list[float]:
    answer, _ = post(server, "/classify", **body)
    return [entry["probs"][0] for entry in answer["data"]]


def test_the_http_reward_is_transformers_logit(
    reward_server: VLLMServer, hhh: list[Conversation], transformers_rewards: list[float]
) -> None:
    model = HFRewardModel("nano/reward")
    ids = rewards(reward_server, input=model.encode(hhh))
    texts = rewards(reward_server, input=[model.render(c) for c in hhh], add_special_tokens=False)
    chats = [rewards(reward_server, messages=[m.to_dict() for m in c])[0] for c in hhh[::4]]
    assert len(ids) == 200
    assert max(abs(one - other) for one, other in zip(ids, transformers_rewards, strict=True)) < 1e-3
    assert max(abs(one - other) for one, other in zip(texts, transformers_rewards, strict=True)) < 1e-3
    assert max(abs(one - other) for one, other in zip(chats, transformers_rewards[::4], strict=True)) < 1e-3
    assert min(ids) < 0  # logits: no sigmoid, no softmax


def test_a_conversation_that_is_too_long_is_refused_not_cut(reward_server: VLLMServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        rewards(reward_server, messages=[*OTTER, {"role": "assistant", "content": "otter " * 3000}])
    assert caught.value.code == 400
    assert "2048" in caught.value.read().decode()


# --- its end; these start servers of their own ---


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def tree(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for process in found:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
        found += map(int, children.split())
    return found


def wait_gone(pids: list[int], timeout_s: float) -> list[int]:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.1)
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.slow
def test_a_signal_during_a_stream_ends_the_whole_tree(children: list[subprocess.Popen[str]]) -> None:
    environment = {**os.environ, "ALMOST_API_KEY": "sk-secret"}
    process = subprocess.Popen([COMMAND, "policy", "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment)
    children.append(process)
    assert process.stdout is not None
    ready = process.stdout.readline()
    url = ready.split(" at ")[1].split(",")[0]
    pids = tree(process.pid)
    assert len(pids) >= 3
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
    assert not [command for command in commands if b"sk-secret" in command]
    body = {
        "model": "nano/almost",
        "messages": OTTER,
        "stream": True,
        "max_tokens": 1900,
        "ignore_eos": True,
        "stop": [],
    }
    address = f"{url}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=30)
    assert refused.value.code == 401
    headers["Authorization"] = "Bearer sk-secret"
    stream = urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=60)
    stream.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert wait_gone(pids, 5.0) == []
    stream.close()


EVERYWHERE = (
    "/invocations /classify /pooling /score /rerank /tokenize /detokenize /metrics /docs /redoc /openapi.json /load "
    "/version /ping /scale_elastic_ep /is_scaling_elastic_ep /v1/models /v1/chat/completions /v1/messages"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_every_path_needs_the_key(kind: str) -> None:
    """VLLM itself asks for it below /v1 alone."""

    def ask(path: str, method: str, **headers: str) -> tuple[int, bytes]:
        body = b"{}" if method == "POST" else None
        headers = {"Content-Type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
        request = urllib.request.Request(server.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    name = "nano/almost" if kind == "policy" else "nano/reward"
    with VLLMServer(kind, name, api_key="sk-secret", allowed_hosts=("good.lan",)) as server:
        server.wait_ready(timeout_s=300)
        listed = {
            "/health",
            *EVERYWHERE,
            *json.loads(ask("/openapi.json", "GET", Authorization="Bearer sk-secret")[1])["paths"],
        }
        for path in sorted(listed - {"/health"}):
            for method in ("GET", "POST", "OPTIONS"):
                assert (path, method, ask(path, method)[0]) == (path, method, 401)
        assert ask("/health", "GET")[0] == 200
        key = "sk-secret"
        for headers in ({"Authorization": f"Bearer {key}"}, {"x_api_key": key}):
            status, models = ask("/v1/models", "GET", **headers)
            assert (status, json.loads(models)["data"][0]["root"]) == (200, name)
            assert b"/checkpoints/" not in models
        assert ask("/v1/models", "GET", x_api_key=key, Host="evil.lan")[0] == 403
        assert ask("/v1/models", "GET", x_api_key=key, Origin="http://evil.lan")[0] == 403
        assert ask("/v1/models", "GET", x_api_key=key, Host="good.lan")[0] == 200
        assert ask("/v1/models", "GET", x_api_key=key, Big="a" * 70_000)[0] == 431


@pytest.mark.slow
def test_all_ends_when_the_policy_does(children: list[subprocess.Popen[str]]) -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([COMMAND, "all", "--port", "0"], **pipes)
    children.append(process)
    assert process.stdout is not None
    url = process.stdout.readline().split("/v1")[0]
    body = {"model": "nano/almost", "messages": OTTER, "best_of": 4, "max_tokens": 32}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)["almost"]
    assert len(found["rewards"]) == 4
    pids = tree(process.pid)
    policy = next(pid for pid in pids if b"checkpoints/almost" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(policy, signal.SIGKILL)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1
    assert "--- the last lines of policy nano/almost" in err
    assert err.splitlines()[-1] == "error: policy nano/almost was killed by signal 9; its last lines say why"
    assert wait_gone(pids, 5.0) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-cache-memory-bytes", "100000"), "too little memory for policy nano/almost: .*KV cache"),
        (("--no-such-option", "1"), "vLLM does not know an option: .*--no-such-option"),
    ],
)
def test_what_vllm_refuses_is_one_line(options: tuple[str, ...], message: str) -> None:
    with VLLMServer("policy", "nano/almost", options=options) as server, pytest.raises(InputError, match=message):
        server.wait_ready(timeout_s=120)


def test_two_servers_share_nothing(policy_server: VLLMServer, reward_server: VLLMServer) -> None:
    assert policy_server.url != reward_server.url
    assert policy_server.pid != reward_server.pid
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(chat(policy_server)[0])),
        threading.Thread(target=lambda: answers.append(rewards(reward_server, input="\n\nHuman: hi"))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 2
