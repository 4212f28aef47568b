"""Several endpoints as one: where requests go, what happens when one dies, and which one is refused at the start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_endpoint import SECRET, Answer, Endpoint, completed, failed

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions
from almost_eval.engines.openai import OpenAIEngine
from almost_eval.engines.openai_parity import TEXT
from almost_eval.errors import InputError, RunError
from almost_eval.run.runner import RunRequest, open_run
from serving.launch.process import wait_ready
from serving.vllm.launch import VLLMServer

PROMPTS = [f"prompt {number}" for number in range(40)]
PARAMS = SamplingParams(max_new_tokens=4, temperature=1.0, seed=1)


def serving(offset: float = 0.0, seconds: float = 0.0, echo: bool = True) -> Callable[[dict[str, Any]], Answer]:
    """The answers of a server that takes some time for each, and whose log-probabilities are off by `offset`."""

    def answer(request: dict[str, Any]) -> Answer:
        if request["prompt"] != TEXT:
            time.sleep(seconds)
            return completed(request)
        if request["echo"] and not echo:
            return failed(400, "echo is not supported")
        tokens = [*TEXT.split(), "swim"] if request["echo"] else ["swim"]
        values = [None if at == 0 and request["echo"] else -1.0 - offset for at in range(len(tokens))]
        status, body = completed(request | {"seed": 0})[:2]
        body["choices"][0]["logprobs"] = {"tokens": tokens, "token_logprobs": values}
        return status, body

    return answer


@pytest.fixture
def endpoints() -> Iterator[list[Endpoint]]:
    """Three servers of the same model, of which a test may make others."""
    three = [Endpoint() for _ in range(3)]
    for endpoint in three:
        endpoint.answer = serving()
    yield three
    for endpoint in three:
        endpoint.close()


def engine(endpoints: list[Endpoint], **options: Any) -> OpenAIEngine:
    return OpenAIEngine("almost", base_url=",".join(endpoint.url for endpoint in endpoints), **options)


def worked(endpoint: Endpoint) -> int:
    """Requests that an endpoint had, without the probe."""
    return sum(request["prompt"] != TEXT for request in endpoint.requests)


def test_equal_endpoints_share_the_work_and_the_answers_are_those_of_one(endpoints: list[Endpoint]) -> None:
    for endpoint in endpoints:
        endpoint.answer = serving(seconds=0.01)
    together = engine(endpoints, concurrency=6)
    assert together.generate(PROMPTS, PARAMS) == engine(endpoints[:1]).generate(PROMPTS, PARAMS)
    assert all(worked(endpoint) >= len(PROMPTS) // 6 for endpoint in endpoints[1:])
    assert together.settings()["base_url"] == ",".join(endpoint.url for endpoint in endpoints)
    assert together.warnings == []


def test_a_slow_endpoint_gets_little_and_holds_nobody_up(endpoints: list[Endpoint]) -> None:
    """It answers nothing until the others have done nearly all: who waited for it, or gave it a third, would stand."""
    slow, *others = endpoints
    others_done, answered = threading.Event(), []

    def waiting(request: dict[str, Any]) -> Answer:
        if request["prompt"] != TEXT:
            answered.append(others_done.wait(60))
        return serving()(request)

    def quick(request: dict[str, Any]) -> Answer:
        if sum(map(worked, others)) >= len(PROMPTS) - 5:
            others_done.set()
        return serving(seconds=0.02)(request)

    slow.answer = waiting
    for endpoint in others:
        endpoint.answer = quick
    engine(endpoints, concurrency=6).generate(PROMPTS, PARAMS)
    assert 1 <= len(answered) <= 5
    assert all(answered)


def test_an_endpoint_that_dies_is_replaced_and_named(
    endpoints: list[Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = engine(endpoints[1:2]).generate(PROMPTS, PARAMS)
    dying, answered = endpoints[0], threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if request["prompt"] != TEXT:
            answered.set()
            dying.server.socket.close()
            raise ConnectionAbortedError  # the connection ends without an answer
        return serving()(request)

    dying.answer = answer
    together = engine(endpoints, concurrency=6)
    assert together.generate(PROMPTS, PARAMS) == whole
    assert answered.is_set()
    assert together.warnings == [f"lost on the way: {dying.url}"]
    assert f"{dying.url} is lost; what it had goes to the others" in capsys.readouterr().err


def test_a_busy_endpoint_rests_for_as_long_as_it_says(endpoints: list[Endpoint]) -> None:
    endpoints[0].answer = lambda request: (
        serving()(request) if request["prompt"] == TEXT else failed(503, "busy", Retry_After="20")
    )
    begun = time.monotonic()
    engine(endpoints, concurrency=3, retries=2).generate(PROMPTS, PARAMS)
    assert worked(endpoints[0]) <= 2
    assert time.monotonic() - begun < 15  # and nobody else waits for it


def test_all_are_lost(endpoints: list[Endpoint]) -> None:
    together = engine(endpoints, retries=1)
    together.check()
    for endpoint in endpoints:
        endpoint.close()
    with pytest.raises(RunError, match="not reachable any more, after 2 tries"):
        together.generate(PROMPTS[:1], PARAMS)


def test_one_that_is_down_at_the_start_is_left_out_and_said(
    endpoints: list[Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoints[0].close()
    together = engine(endpoints)
    together.generate(PROMPTS, PARAMS)
    assert f"{endpoints[0].url} is not reachable; the run goes on with the other 2" in capsys.readouterr().err
    assert together.warnings == [f"lost on the way: {endpoints[0].url}"]
    for endpoint in endpoints[1:]:
        endpoint.close()
    with pytest.raises(InputError, match="is not reachable; start it, or check base_url"):
        engine(endpoints).check()


@pytest.mark.parametrize("echo", [True, False])
def test_one_with_other_log_probabilities_is_refused_by_name(endpoints: list[Endpoint], echo: bool) -> None:
    for endpoint, offset in zip(endpoints, (0.0, 0.01, 0.3), strict=True):
        endpoint.answer = serving(offset, echo=echo)
    with pytest.raises(InputError, match=rf"{endpoints[2].url} gives other log-probabilities than the rest \(by 0\.3 "):
        engine(endpoints).generate(PROMPTS, PARAMS)
    assert not any(worked(endpoint) for endpoint in endpoints)
    engine(endpoints[:2]).check()


@pytest.mark.parametrize("offsets", [(0.0, float("nan"), 0.0), (0.0, float("inf"), 0.0), (float("nan"),) * 3])
def test_log_probabilities_that_are_no_numbers_are_refused_by_name(
    endpoints: list[Endpoint], offsets: tuple[float, ...]
) -> None:
    """Nothing is larger than a tolerance where it is compared with NaN."""
    for endpoint, offset in zip(endpoints, offsets, strict=True):
        endpoint.answer = serving(offset)
    broken = endpoints[1] if offsets[0] == 0 else endpoints[0]
    with pytest.raises(InputError, match=f"{broken.url} gives log-probabilities that are no numbers"):
        engine(endpoints).check()


def test_one_that_refuses_the_key_is_named(endpoints: list[Endpoint]) -> None:
    endpoints[2].models = failed(401)
    with pytest.raises(InputError, match=rf"^the endpoint {endpoints[2].url} refuses the key \(401\)"):
        engine(endpoints).check()


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(401, InputError, "refuses the key"), (404, InputError, "has no model"), (400, InputError, "refuses the request")],
)
def test_one_that_refuses_on_the_way_is_named(
    endpoints: list[Endpoint], status: int, error: type[Exception], words: str
) -> None:
    endpoints[1].answer = lambda request: serving()(request) if request["prompt"] == TEXT else failed(status)
    with pytest.raises(error, match=f"^the endpoint {endpoints[1].url} {words}"):
        engine(endpoints).generate(PROMPTS, PARAMS)


def test_one_that_tells_nothing_cannot_be_compared(endpoints: list[Endpoint]) -> None:
    endpoints[1].answer = completed
    with pytest.raises(InputError, match=f"{endpoints[1].url} tells no log-probabilities"):
        engine(endpoints).check()


def test_one_that_serves_another_model_is_refused_by_name(endpoints: list[Endpoint]) -> None:
    endpoints[1].models = (200, {"object": "list", "data": [{"id": "other", "object": "model"}]})
    with pytest.raises(InputError, match=f"{endpoints[1].url} serves no model 'almost'"):
        engine(endpoints).check()


def test_the_shortest_context_counts(endpoints: list[Endpoint]) -> None:
    for endpoint, length in zip(endpoints, (64, 32, 128), strict=True):
        card = {"id": "almost", "object": "model", "max_model_len": length}
        endpoint.models = (200, {"object": "list", "data": [card]})
    together = engine(endpoints)
    together.check()
    assert together.context_limit == 32


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("http://a/v1,http://a/v1/", "names http://a/v1/ twice"),
        ("http://a/v1,HTTP://A:80/v1/", "names http://A:80/v1/ twice"),
        ("https://a/v1,https://a:443/v1", "names https://a:443/v1 twice"),
        ("http://a/v1,b", "is not an http"),
        ("http://a/v1 http://b/v1", "is not an http"),
        ("http://a/v1;http://b/v1", "is not an http"),
        ("http://a/v1,http://me:pw@b/v1", "none may hold a user or a password"),
        (",", "is empty"),
    ],
)
def test_addresses_that_are_refused(urls: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        OpenAIEngine("almost", base_url=urls)
    assert "pw" not in str(refusal.value)


def test_each_endpoint_gets_the_key_and_its_own_host(
    endpoints: list[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALMOST_API_KEY", SECRET)
    for endpoint in endpoints:
        endpoint.answer = serving(seconds=0.01)
    engine(endpoints, concurrency=6).generate(PROMPTS, PARAMS)
    for endpoint in endpoints:
        assert {headers["authorization"] for headers in endpoint.headers} == {f"Bearer {SECRET}"}
        assert {headers["host"] for headers in endpoint.headers} == {endpoint.url.split("/")[2]}


@pytest.mark.alone("a ratio of two times")
def test_two_endpoints_of_a_fixed_service_time_take_half_of_the_time(endpoints: list[Endpoint]) -> None:
    """Each answers one request after the other, as a machine of its own would."""
    for endpoint in endpoints:
        turn, answer = threading.Lock(), serving(seconds=0.1)

        def one_by_one(request: dict[str, Any], turn: Any = turn, answer: Any = answer) -> Answer:
            with turn:
                return answer(request)

        endpoint.answer = one_by_one
    seconds = []
    for some in (endpoints[:1], endpoints[:2]):
        one = engine(some, concurrency=8)
        one.generate(PROMPTS[:4], PARAMS)  # imports, connections
        begun = time.monotonic()
        one.generate(PROMPTS[4:24], PARAMS)
        seconds.append(time.monotonic() - begun)
    assert seconds[1] <= 0.6 * seconds[0]


@pytest.mark.slow
def test_two_servers_of_vllm_one_killed() -> None:
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'almost-toolkit[vllm]'")
    options = ["--dtype", "float32"]
    with (
        VLLMServer("policy", "nano/almost", options=options) as first,
        VLLMServer("policy", "nano/almost", options=options) as second,
    ):
        wait_ready([first, second], timeout_s=400)
        alone = _scores([f"{first.url}/v1"])
        shared = _scores([f"{first.url}/v1", f"{second.url}/v1"], kill=second, after=20)
    assert shared.keys() == alone.keys()
    assert max(abs(a - b) for id in alone for a, b in zip(alone[id], shared[id], strict=True)) < 1e-4


def _scores(urls: list[str], kill: VLLMServer | None = None, after: int = 0) -> dict[str, list[float]]:
    """Sample -> log-likelihoods; one server is killed when some samples are known."""
    request = RunRequest(
        task="hhh",
        protocol="likelihood",
        model="nano/almost",
        engine=EngineOptions("openai", base_url=",".join(urls), concurrency=8),
        data="nano",
    )
    run = open_run(request)
    scores = {}
    for number, (index, outputs, _) in enumerate(run.answers(range(len(run.samples)))):
        scores[run.samples[index].id] = [value for row in outputs["loglikelihoods"] for value in row]
        if kill is not None and number == after:
            kill.kill()
    lost = run.model.report.warnings
    assert lost == ([f"lost on the way: {kill.url}/v1"] if kill else [])
    return scores
