"""What the servers behind may do to the gateway: be away, die, hang, talk nonsense; and that all of it is told well."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_upstream import FakeUpstream, Served, event

from serving.gateway.app import GatewaySettings, create_app
from serving.gateway.limits import Limited, Slots, ends_with_client
from serving.gateway.metrics import Metrics
from serving.gateway.streaming import EVENTS, ReplyWriter
from serving.launch.process import free_port

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
PLAIN = {"messages": HELLO}
BEST = {"messages": HELLO, "best_of": 3}


class Two:
    """A gateway before a policy and a reward server, each with a mode of its own."""

    def __init__(self, stack: ExitStack, **settings: Any) -> None:
        self.policy, self.reward = FakeUpstream(), FakeUpstream()
        self.servers = {name: stack.enter_context(getattr(self, name).served()) for name in ("policy", "reward")}
        urls = {"policy_url": self.servers["policy"].url, "reward_url": self.servers["reward"].url}
        served = stack.enter_context(Served.of(create_app(GatewaySettings(**urls, api_key=None, **settings))))
        self.client = stack.enter_context(httpx.Client(base_url=served.url, timeout=20))

    def post(self, body: dict[str, Any], path: str = CHAT) -> httpx.Response:
        return self.client.post(path, json=body)


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    with ExitStack() as stack:
        yield Two(stack, reward_timeout_s=getattr(request, "param", 0.5))


def code(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    return answer.status_code, error["code"]


# --- the policy ---


@pytest.mark.parametrize("mode", ["garbage", "not a number", "redirect", "die", "fail"])
@pytest.mark.parametrize("body", [PLAIN, BEST])
def test_policy_misbehaves(two: Two, mode: str, body: dict[str, Any]) -> None:
    two.policy.mode = mode
    answer = two.post(body)
    assert code(answer) == (502, "policy_failed")
    assert ("out of luck" in answer.text) == (mode == "fail")
    two.policy.mode = "good"
    assert two.post(body).status_code == 200


def test_policy_is_away_and_comes_back(two: Two) -> None:
    port = two.servers["policy"].port
    assert two.post(PLAIN).status_code == 200
    two.servers["policy"].stop()
    for body in (PLAIN, BEST, {**PLAIN, "stream": True}):
        answer = two.post(body)
        assert (code(answer), answer.headers["retry-after"]) == ((502, "policy_unavailable"), "1")
    assert code(two.client.get("/v1/models")) == (502, "policy_unavailable")
    ready = two.client.get("/ready")
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "policy": False, "reward": True})
    conversation = [*HELLO, {"role": "assistant", "content": "answer 3"}]
    assert two.post({"conversations": [conversation]}, "/v1/rewards").json()["rewards"] == [3.0]
    with two.policy.served(port):
        assert two.post(PLAIN).status_code == 200
        assert two.client.get("/ready").status_code == 200


def test_policy_dies_in_the_middle_of_an_event(two: Two) -> None:
    """What was whole has arrived byte for byte; what was not is left out, and an error event closes the stream."""
    two.policy.mode = "half-event"
    answer = two.post({**PLAIN, "stream": True})
    whole = b"".join(map(event, range(4)))
    assert answer.content.startswith(whole)
    error, done, rest = answer.content[len(whole) :].split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "policy_failed"
    assert (done, rest) == (b"data: [DONE]", b"")


def test_a_stream_passes_byte_for_byte(two: Two) -> None:
    two.policy.tokens = 500  # more than a socket's buffer takes at once, so that chunks end in the middle of events
    answer = two.post({**PLAIN, "stream": True})
    assert answer.content == b"".join(map(event, range(500))) + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            {"error": {"message": "out of luck in /srv/models/x/run.py", "type": "BadRequestError", "code": 400}},
            {"message": "out of luck in .../run.py", "type": "BadRequestError", "param": None, "code": 400},
        ),
        (
            {"error": {"message": "sk-secret-of-another", "trace": "/root/x.py"}, "choices": []},
            {"message": "***", "type": "server_error", "param": None, "code": None},
        ),
        (
            {"error": "/root/x.py failed"},
            {
                "message": "the policy server failed within its answer: .../x.py failed",
                "type": "server_error",
                "param": None,
                "code": "policy_failed",
            },
        ),
    ],
)
def test_an_error_within_a_stream_is_written_anew(two: Two, error: dict[str, Any], expected: dict[str, Any]) -> None:
    two.policy.error_in_stream = json.dumps(error, indent=1).replace("\n", "\ndata: ").encode()  # in several lines
    answer = two.post({**PLAIN, "stream": True})
    whole = b"".join(map(event, range(4)))
    assert answer.content.startswith(whole)
    told, done, rest = answer.content[len(whole) :].split(b"\n\n")
    assert json.loads(told.removeprefix(b"data: ")) == {"error": expected}
    assert (done, rest) == (b"data: [DONE]", b"")


def test_an_answer_about_errors_passes_as_it_is(two: Two) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": 'say "error": {"error": 1}'}}], "error": None}
    two.policy.error_in_stream = json.dumps(chunk).encode()
    answer = two.post({**PLAIN, "stream": True})
    assert b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]" in answer.content


@pytest.mark.alone("0.15 s to the first token")
def test_a_slow_stream_is_not_held_back(two: Two) -> None:
    two.policy.mode = "slow"
    began = time.perf_counter()
    arrived: list[float] = []
    with two.client.stream("POST", CHAT, json={**PLAIN, "stream": True}) as answer:
        for _ in answer.iter_raw():
            arrived.append(time.perf_counter() - began)
    assert len(arrived) == 5  # four tokens and [DONE]
    assert arrived[0] < 0.15 < arrived[1]  # the fake waits 0.2 s between two


def test_a_killed_process_ends_its_streams_well() -> None:
    """A process, not a thread: the kernel closes its connections."""
    port = free_port()
    program = (
        "import sys, time; from fake_upstream import FakeUpstream; fake = FakeUpstream(); fake.mode = 'slow'; "
        f"fake.tokens = 1000; server = fake.served({port}); server.__enter__(); print('up', flush=True); time.sleep(60)"
    )
    upstream = subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    try:
        assert upstream.stdout is not None
        assert upstream.stdout.readline() == "up\n"
        settings = GatewaySettings(policy_url=f"http://127.0.0.1:{port}", api_key=None)
        with Served.of(create_app(settings)) as served:
            with httpx.stream("POST", served.url + CHAT, json={**PLAIN, "stream": True}, timeout=20) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: {")
                upstream.send_signal(signal.SIGKILL)
                *_, error, done = (line for line in lines if line)
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "policy_failed"
            assert done == "data: [DONE]"
    finally:
        upstream.kill()
        upstream.wait()


# --- the reward model ---


@pytest.mark.parametrize(("mode", "expected"), [("garbage", 503), ("die", 503), ("fail", 503), ("hang", 504)])
def test_reward_misbehaves(two: Two, mode: str, expected: int) -> None:
    two.reward.mode = mode
    assert two.post(BEST).status_code == expected
    assert two.post({"conversations": [HELLO]}, "/v1/rewards").status_code == expected
    assert two.post(PLAIN).status_code == 200  # what needs no reward works on
    answer = two.post({**BEST, "best_of_fallback": True})
    assert answer.status_code == 200
    almost = answer.json()["almost"]
    assert almost["fallback"].startswith("the reward server ")
    assert (almost["reward"], almost["rewards"], almost["chosen"]) == (None, [None] * 3, [0])
    assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [" answer 0"]
    two.reward.mode = "good"
    assert two.post(BEST).json()["almost"]["reward"] == 2.0
    time.sleep(0.1)
    assert two.reward.running == 0  # the requests that hung have ended


def test_reward_is_away_and_comes_back(two: Two) -> None:
    port = two.servers["reward"].port
    two.servers["reward"].stop()
    assert code(two.post(BEST)) == (503, "reward_unavailable")
    assert code(two.post({**BEST, "stream": True})) == (503, "reward_unavailable")
    # It is known to be down by now: no candidate is drawn in vain, and the fallback draws one, as it says.
    assert len(two.policy.seen) == 1
    almost = two.post({**BEST, "best_of_fallback": True}).json()["almost"]
    assert two.policy.seen[-1][2]["n"] == 1
    assert (almost["best_of"], almost["rewards"], almost["reward"]) == (1, [None], None)
    assert almost["fallback"].startswith("the reward server is not reachable")
    assert two.client.get("/ready").json() == {"ready": False, "policy": True, "reward": False}
    with two.reward.served(port):
        time.sleep(1.0)  # for so long it is taken to be down
        assert two.post(BEST).json()["almost"]["reward"] == 2.0


def test_no_reward_server_at_all() -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream().served())
        app = create_app(GatewaySettings(policy_url=upstream.url, api_key=None))
        client = stack.enter_context(httpx.Client(base_url=stack.enter_context(Served.of(app)).url))
        for path, body in ((CHAT, BEST), ("/v1/rewards", {"conversations": [HELLO]})):
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_reward_server")
        assert client.post(CHAT, json={**BEST, "best_of_fallback": True}).json()["almost"]["best_of"] == 1
        assert client.get("/ready").json() == {"ready": True, "policy": True}


# --- the gateway itself ---


@pytest.mark.parametrize("begun", [False, True])
def test_a_bug_of_ours_is_told_well_and_lets_its_slot_go(begun: bool) -> None:
    settings = GatewaySettings(policy_url="http://127.0.0.1:1", api_key=None)
    metrics = Metrics()
    slots = Slots(1, metrics)

    async def handler(body: bytes, reply: ReplyWriter) -> None:
        if begun:
            await reply.start(200, EVENTS)
            await reply.part(event(0))
        raise ZeroDivisionError(body)

    with Served.of(Limited(handler, settings, slots, metrics)) as served:
        for _ in range(2):
            answer = httpx.post(served.url, json={"secret": 1})
            told = answer.text
            if begun:
                first, told, done, rest = answer.text.split("\n\n")
                assert (first + "\n\n", done, rest) == (event(0).decode(), "data: [DONE]", "")
            assert answer.status_code == (200 if begun else 500)
            error = json.loads(told.removeprefix("data: "))["error"]
            assert (error["type"], error["code"]) == ("server_error", "internal_error")
            assert "secret" not in told
    assert slots.taken == 0


def test_a_cancellation_is_told_and_goes_on() -> None:
    """Who cancels a task waits for its end: one that ends as if nothing had been is taken to have done its work."""
    settings = GatewaySettings(policy_url="http://127.0.0.1:1", api_key=None)
    slots = Slots(1, Metrics())
    bodies = [b"{}"]
    sent: list[Any] = []

    async def handler(body: bytes, reply: ReplyWriter) -> None:
        await asyncio.sleep(60)

    async def receive() -> dict[str, Any]:
        if not bodies:
            await asyncio.sleep(60)  # the client stays
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async def scenario() -> bool:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
        task = asyncio.create_task(Limited(handler, settings, slots, Metrics())(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        return task.cancelled()

    was_cancelled = asyncio.run(scenario())
    assert was_cancelled
    start, body = sent
    assert start["status"] == 503
    assert json.loads(body["body"])["error"]["code"] == "shutting_down"
    assert slots.taken == 0


def test_a_client_that_leaves_hides_no_other_cancellation() -> None:
    async def scenario() -> bool:
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            async with ends_with_client(receive):
                await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        left.set()
        await asyncio.sleep(0)  # the client's departure cancels the task, and before it runs again so do we
        task.cancel()
        await asyncio.wait([task], timeout=5)
        return task.cancelled()

    was_cancelled = asyncio.run(scenario())
    assert was_cancelled


# --- many at once ---


@pytest.mark.parametrize("two", [15.0], indirect=True, ids=["patient"])  # 128 at once may take more than 0.5 s
def test_a_thousand_requests_amid_faults(two: Two) -> None:
    """The small sister of the soak in benchmarks/serving.py: every request ends well, and nothing is left behind."""
    modes = ["good", "good", "garbage", "die", "fail", "half-event"]

    async def soak() -> Counter[str]:
        rng = random.Random(0)
        ended: Counter[str] = Counter()
        url = str(two.client.base_url)

        async def worker(client: httpx.AsyncClient) -> None:
            for _ in range(63):
                two.policy.mode, two.reward.mode = rng.choice(modes), rng.choice(modes)
                body: dict[str, Any] = {**PLAIN, "stream": rng.random() < 0.4}
                if rng.random() < 0.5:
                    body |= {"best_of": rng.randint(1, 8), "best_of_fallback": rng.random() < 0.3}
                leaves = rng.random() < 0.2
                try:
                    async with asyncio.timeout(rng.uniform(0, 0.05) if leaves else 15):
                        answer = await client.post(CHAT, json=body)
                except TimeoutError:
                    assert leaves, "a request hangs"
                    ended["left"] += 1
                    continue
                ended[judge(answer, body)] += 1

        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            await asyncio.gather(*(worker(client) for _ in range(16)))
        return ended

    ended = asyncio.run(soak())
    assert sum(ended.values()) == 1008
    assert ended.keys() == {"left", "right", "error", "error in a stream"}
    assert min(ended.values()) > 20
    metrics = two.client.get("/metrics").text
    assert "almost_gateway_running 0.0" in metrics


def judge(answer: httpx.Response, body: dict[str, Any]) -> str:
    """How a request ended; anything else than a right answer or a well-formed error fails."""
    if answer.status_code != 200:
        assert code(answer)[0] in (502, 503)
        return "error"
    if body["stream"]:
        *events, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        last = json.loads(events[-1].removeprefix("data: "))
        if "error" in last:
            return "error in a stream"
        assert last["choices"][0]["finish_reason"] == "stop" if "best_of" in body else len(events) == 4
    else:
        assert answer.json()["choices"][0]["message"]["content"].startswith(" answer ")
    return "right"
