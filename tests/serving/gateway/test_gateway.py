"""The gateway before real vLLM: what it passes through is what vLLM says; who leaves ends vLLM's work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_upstream import FakeUpstream, Served

from serving.gateway.app import GatewaySettings, create_app

CHAT = "/v1/chat/completions"
OTTER = [{"role": "user", "content": "What does the otter eat?"}]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bare(policy_server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=policy_server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def gateway(policy_server: Any, reward_server: Any) -> Iterator[httpx.Client]:
    settings = GatewaySettings(policy_url=policy_server.url, reward_url=reward_server.url, api_key=None)
    with Served.of(create_app(settings)) as served, httpx.Client(base_url=served.url, timeout=120) as client:
        yield client


def without_ids(text: str) -> str:
    """An answer but for what differs between any two requests."""
    return re.sub(r'"(id|created)": ?("[^"]*"|\d+)', "", text)


def said(answer: httpx.Response) -> Any:
    """What an answer says; of a stream the texts and ends, since a busy vLLM puts several tokens in a chunk."""
    if answer.status_code >= 400:  # written anew, with the same words
        return answer.json()
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return without_ids(answer.text)
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found: dict[int, list[Any]] = {}
    for chunk in (json.loads(event.removeprefix("data: ")) for event in events):
        for choice in chunk["choices"]:
            text, ends = found.setdefault(choice["index"], ["", []])
            part = choice["text"] if "text" in choice else choice["delta"].get("content")
            found[choice["index"]] = [text + (part or ""), [*ends, *filter(None, [choice["finish_reason"]])]]
    return found, chunk.get("usage")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": OTTER, "max_tokens": 12, "temperature": 0}),
        (CHAT, {"messages": OTTER, "max_tokens": 12, "seed": 5, "n": 3}),
        (CHAT, {"messages": OTTER, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {"messages": OTTER, "max_tokens": 12, "temperature": 0, "stream": True}),
        (
            CHAT,
            {
                "messages": OTTER,
                "max_tokens": 4,
                "seed": 5,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        (CHAT, {"messages": OTTER, "max_tokens": -1}),
        (CHAT, {"messages": OTTER, "temperature": "hot"}),
        (CHAT, {"messages": OTTER, "model": "gpt-5"}),
        (CHAT, {"messages": [{"role": "user", "content": "otter " * 3000}]}),
        ("/v1/completions", {"prompt": "The otter eats", "max_tokens": 5, "temperature": 0, "logprobs": 1}),
        ("/v1/completions", {"prompt": ["The otter", "A heron"], "max_tokens": 5, "temperature": 0, "stream": True}),
        ("/v1/completions", {"prompt": [[5, 6, 7]], "max_tokens": 1, "temperature": 0, "echo": True}),
    ],
)
def test_passed_through_is_what_vllm_says(
    bare: httpx.Client, gateway: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    ours, theirs = gateway.post(path, json=body), bare.post(path, json=body)
    assert ours.status_code == theirs.status_code
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert ours.headers.get("almost-default-stop") == theirs.headers.get("almost-default-stop")
    assert said(ours) == said(theirs)


def test_models(bare: httpx.Client, gateway: httpx.Client) -> None:
    assert [model["id"] for model in gateway.get("/v1/models").json()["data"]] == ["nano/almost"]


def test_health_ready_metrics(gateway: httpx.Client) -> None:
    assert gateway.get("/health").json() == {"status": "ok"}
    assert gateway.get("/ready").json() == {"ready": True, "policy": True, "reward": True}
    gateway.get("/no/such/path")
    metrics = gateway.get("/metrics").text
    assert 'almost_gateway_requests_total{route="/ready",status="200"}' in metrics
    assert 'route="other",status="404"' in metrics
    assert "/no/such/path" not in metrics
    assert "process_resident_memory_bytes" in metrics


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"best_of": 8}])
def test_a_client_that_leaves_ends_vllms_work(bare: httpx.Client, gateway: httpx.Client, body: dict[str, Any]) -> None:
    def running() -> float:
        lines = bare.get("/metrics").text.splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))

    async def leave_once_it_runs() -> None:
        request = {"messages": OTTER, "max_tokens": 2000, "ignore_eos": True, "stop": [], **body}
        async with httpx.AsyncClient(base_url=gateway.base_url, timeout=None) as client:
            asked = asyncio.create_task(client.post(CHAT, json=request))
            while not await asyncio.to_thread(running):
                assert not asked.done()
                await asyncio.sleep(0.01)
            asked.cancel()

    assert running() == 0
    asyncio.run(leave_once_it_runs())
    # 2,000 tokens take several seconds; it is over in less, because vLLM was told.
    until(lambda: running() == 0, 3.0)
    assert gateway.post(CHAT, json={"messages": OTTER, "max_tokens": 1}).status_code == 200


# --- as a command ---


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "serving.cli", "gateway", *arguments]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_what_it_began(number: signal.Signals) -> None:
    """A signal in the middle of a stream: the stream goes on to its end, then the process ends with 0."""
    fake = FakeUpstream()
    fake.mode = "slow"
    with fake.served() as upstream:
        process = command("--policy-url", upstream.url, "--port", "0", ALMOST_API_KEY="k")
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("gateway on http://127.0.0.1:")
            url = line.split()[2].removesuffix("/v1;")
            headers = {"Authorization": "Bearer k"}
            until(lambda: _answers(url), 10)
            body = {"messages": OTTER, "stream": True}
            with httpx.stream("POST", url + CHAT, json=body, headers=headers, timeout=20) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(number)
                assert [line for line in lines if line][-1] == "data: [DONE]"
            assert process.wait(10) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
            process.wait()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has this scheduling policy")
def test_the_command_takes_no_core_from_a_model_at_work() -> None:
    with FakeUpstream().served() as upstream:
        process = command("--policy-url", upstream.url, "--port", "0")
        try:
            assert process.stderr is not None
            process.stderr.readline()
            until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_BATCH, 5)
        finally:
            process.kill()
            process.wait()


def test_the_command_refuses_in_one_line() -> None:
    with FakeUpstream().served() as upstream:
        taken = command("--policy-url", upstream.url, "--port", str(upstream.port))
        wrong = command("--policy-url", "localhost:8000")
        for process, words in ((taken, "cannot listen on 127.0.0.1 port"), (wrong, "--policy-url is not an http(s)")):
            _, err = process.communicate(timeout=20)
            assert process.returncode == 2
            assert words in err
            assert err.count("\n") == 1


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def until(true: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_the_document_is_json(gateway: httpx.Client) -> None:
    document = json.loads(gateway.get("/openapi.json").text)
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["best_of"]["anyOf"][0]["maximum"] == 16
