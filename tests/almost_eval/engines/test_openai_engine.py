"""The engine of OpenAI-compatible endpoints, against a local server that fails on order, and against vLLM's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import SECRET, Answer, Endpoint, completed, failed

from almost_eval.engines.base import GenerationEngine, SamplingParams
from almost_eval.engines.build import EngineOptions, generation_engine
from almost_eval.engines.openai import OpenAIEngine
from almost_eval.errors import AlmostError, InputError, RunError
from almost_eval.models.endpoints import KEYS

SAMPLED = SamplingParams(max_new_tokens=8, temperature=1.0, n=2, stop=("\n\nHuman:",), seed=3)


def engine(endpoint: Endpoint, **options: Any) -> OpenAIEngine:
    return OpenAIEngine("almost", base_url=endpoint.url, **options)


# --- what is asked, and what is made of the answer ---


def test_completions_in_order_and_what_was_sent(endpoint: Endpoint) -> None:
    done = engine(endpoint).generate(["a", "b", "c"], SAMPLED)
    assert [[c.text.split()[0] for c in row] for row in done] == [["a", "a"], ["b", "b"], ["c", "c"]]
    assert all(c.finish_reason == "stop" and c.token_ids == () for row in done for c in row)
    assert len({request["seed"] for request in endpoint.requests}) == 6
    assert all(0 <= request["seed"] < 2**31 for request in endpoint.requests)
    [request] = [r for r in endpoint.requests if done[0][0].text == f" a {r['seed']}"]
    assert request == {
        "model": "almost", "prompt": "a", "max_tokens": 8, "temperature": 1.0, "top_p": 1.0,
        "stop": ["\n\nHuman:"], "seed": request["seed"],
    }  # fmt: skip
    assert isinstance(engine(endpoint), GenerationEngine)


def test_what_is_missing_after_a_kill_is_drawn_as_it_would_have_been(endpoint: Endpoint) -> None:
    whole = engine(endpoint).generate(["a", "b", "c"], SAMPLED)
    assert engine(endpoint).generate(["c", "b"], SAMPLED) == [whole[2], whole[1]]
    assert engine(endpoint).generate(["a"], SamplingParams(8, 1.0, n=2, stop=SAMPLED.stop, seed=4)) != whole[:1]


def test_greedy_is_asked_once(endpoint: Endpoint) -> None:
    [row] = engine(endpoint).generate(["a"], SamplingParams(8, n=3))
    assert len(endpoint.requests) == 1
    assert len(row) == 3
    assert "stop" not in endpoint.requests[0]


def test_stop_strings_are_cut_here_too_and_no_more_than_four_are_sent(endpoint: Endpoint) -> None:
    endpoint.answer = lambda request: completed(request, " one five two", "length")
    stop = ("six", "seven", "eight", "nine", "five")
    [[completion]] = engine(endpoint).generate(["a"], SamplingParams(8, stop=stop))
    assert (completion.text, completion.finish_reason) == (" one ", "stop")
    assert endpoint.requests[0]["stop"] == list(stop[:4])


@pytest.mark.parametrize(("said", "meant"), [("stop", "stop"), ("length", "length"), ("content_filter", "length")])
def test_finish_reasons(endpoint: Endpoint, said: str, meant: str) -> None:
    endpoint.answer = lambda request: completed(request, " x", said)
    assert engine(endpoint).generate(["a"], SamplingParams(8))[0][0].finish_reason == meant


def test_no_more_requests_at_a_time_than_allowed(endpoint: Endpoint) -> None:
    def slow(request: dict[str, Any]) -> Answer:
        time.sleep(0.1)
        return completed(request)

    endpoint.answer = slow
    assert len(engine(endpoint, concurrency=4).generate([str(i) for i in range(20)], SAMPLED)) == 20
    assert endpoint.most_at_once == 4


def test_answers_arrive_as_they_are_known_and_the_rest_is_not_asked_for(endpoint: Endpoint) -> None:
    slow = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if request["prompt"] == "slow":
            slow.wait(20)
        return completed(request)

    endpoint.answer = answer
    stream = engine(endpoint, concurrency=2).stream_completions(["slow", *"abcdefgh"], SamplingParams(8))
    assert next(iter(stream))[0] == 1
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 5
    slow.set()
    assert len(endpoint.requests) <= 4


# --- the key ---


@pytest.mark.parametrize("name", KEYS)
def test_the_key_comes_from_the_environment_and_shows_nowhere(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    caplog.set_level("DEBUG")
    one = engine(endpoint)
    one.generate(["a"], SAMPLED)
    assert {headers["authorization"] for headers in endpoint.headers} == {f"Bearer {SECRET}"}
    shown = [repr(one), json.dumps(one.settings()), caplog.text]
    for status in (400, 401, 403, 404, 418, 422):
        endpoint.answer = lambda _, status=status: failed(status, f"Incorrect key: {SECRET}.")
        with pytest.raises(AlmostError) as caught:
            one.generate(["a"], SAMPLED)
        shown.append(f"{caught.value} {caught.value.__cause__}")
        assert "\n" not in str(caught.value)
    assert SECRET not in "".join(shown)


def test_a_password_in_the_address_shows_nowhere(endpoint: Endpoint) -> None:
    address = endpoint.url.replace("http://", f"http://someone:{SECRET}@")
    one = OpenAIEngine("none", base_url=address)
    with pytest.raises(InputError, match="serves no model") as caught:
        one.check()
    assert SECRET not in str(caught.value) + json.dumps(one.settings())


def test_no_key_is_needed_where_none_is_asked_for(endpoint: Endpoint) -> None:
    assert engine(endpoint).generate(["a"], SAMPLED)


# --- failures ---


def test_an_endpoint_that_is_down_is_one_line(endpoint: Endpoint) -> None:
    endpoint.close()
    began = time.monotonic()
    with pytest.raises(InputError, match=f"{endpoint.url} is not reachable; start it, or check base_url"):
        generation_engine("almost", EngineOptions("openai", base_url=endpoint.url))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (failed(401), "refuses the key .401.; set ALMOST_API_KEY or OPENAI_API_KEY"),
        (failed(503, x_should_retry="false"), "answers 503; start it"),
    ],
)
def test_refused_at_the_start(endpoint: Endpoint, models: Answer, message: str) -> None:
    endpoint.models = models
    with pytest.raises(InputError, match=message):
        engine(endpoint).check()


def test_an_unknown_model_is_told_what_is_served(endpoint: Endpoint) -> None:
    with pytest.raises(InputError, match=r"serves no model 'almots'; did you mean 'almost'\? known: almost"):
        OpenAIEngine("almots", base_url=endpoint.url).generate(["a"], SAMPLED)
    assert endpoint.requests == []


@pytest.mark.parametrize("models", [failed(404), (200, {"unexpected": 1}), (200, b"<html>")])
def test_an_endpoint_need_not_list_its_models(endpoint: Endpoint, models: Answer) -> None:
    endpoint.models = models
    assert engine(endpoint).generate(["a"], SAMPLED)
    endpoint.answer = lambda _: failed(404)
    with pytest.raises(InputError, match="has no model 'almost'"):
        engine(endpoint).generate(["a"], SAMPLED)


def test_retries_after_as_long_as_the_server_says(endpoint: Endpoint) -> None:
    seen: Counter[str] = Counter()

    def answer(request: dict[str, Any]) -> Answer:
        seen[request["prompt"]] += 1
        turn = seen[request["prompt"]]
        if request["prompt"] == "busy" and turn == 1:
            return failed(429, retry_after="1")
        return failed(500, retry_after="0.01") if request["prompt"] == "broken" and turn <= 2 else completed(request)

    endpoint.answer = answer
    began = time.monotonic()
    done = engine(endpoint).generate(["busy", "broken", "fine"], SamplingParams(8))
    assert time.monotonic() - began >= 1
    assert [row[0].text.split()[0] for row in done] == ["busy", "broken", "fine"]
    assert seen == {"busy": 2, "broken": 3, "fine": 1}


@pytest.mark.parametrize("status", [429, 500])
def test_retries_end(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda _: failed(status, "over capacity", retry_after="0.01")
    with pytest.raises(RunError, match=f"still answers {status} after 3 tries .over capacity.; what was done is kept"):
        engine(endpoint, retries=2).generate(["a"], SamplingParams(8))
    assert len(endpoint.requests) == 3


def test_a_timeout_is_tried_again_and_then_told(endpoint: Endpoint) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        time.sleep(0.5)
        return completed(request)

    endpoint.answer = answer
    with pytest.raises(RunError, match=r"gave no answer within 0\.1 s, 2 times"):
        engine(endpoint, retries=1, timeout=0.1).generate(["a"], SamplingParams(8))
    assert len(endpoint.requests) == 2


def test_a_refused_request_is_the_users_to_mend_and_not_repeated(endpoint: Endpoint) -> None:
    endpoint.answer = lambda _: failed(400, "maximum context length\nis 128 tokens")
    with pytest.raises(InputError, match=r"refuses the request \(400\): maximum context length is 128 tokens"):
        engine(endpoint).generate(["a"], SamplingParams(8))
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": None}, {}, b"<html>hello</html>", b"\xff", [1]])
def test_an_answer_that_is_none(endpoint: Endpoint, body: Any) -> None:
    endpoint.answer = lambda _: (200, body)
    with pytest.raises(RunError, match=r"cannot be read|something else than a completion"):
        engine(endpoint).generate(["a"], SamplingParams(8))


INTERRUPTED = """
import sys
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.openai import OpenAIEngine
stream = OpenAIEngine("almost", base_url=sys.argv[1]).stream_completions(["slow", "fast"], SamplingParams(8))
print(next(stream)[0], flush=True)
raise KeyboardInterrupt
"""


def test_the_end_of_the_process_waits_for_no_answer(endpoint: Endpoint) -> None:
    never = threading.Event()

    def answer(request: dict[str, Any]) -> Answer:
        if request["prompt"] == "slow":
            never.wait(30)
        return completed(request)

    endpoint.answer = answer
    command = [sys.executable, "-c", INTERRUPTED, endpoint.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=25)
    never.set()
    assert done.stdout == "1\n", done.stderr


# --- vLLM's own server ---


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, checkpoint) of vLLM's OpenAI server, or a skip where it is not ready in time."""
    from almost_eval.nano.seeded import build_checkpoint

    folder = tmp_path_factory.mktemp("served")
    checkpoint = build_checkpoint(
        folder / "model", hidden_size=64, heads=2, layers=2, vocab_size=320, max_position_embeddings=128,
        tokenizer_text=["The cat sat on the mat, and the dog sat by the door. Hello world."] * 4,
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--dtype float32 --max-model-len 128 --enforce-eager --block-size 32 --generation-config vllm"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += [*flags.split(), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "almost"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        for _ in range(120):
            if server.poll() is not None:
                pytest.skip(f"vLLM's server ended: {(folder / 'server.log').read_text()[-400:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(1)
        else:
            pytest.skip("vLLM's server was not ready in time")
        yield f"http://127.0.0.1:{port}/v1", checkpoint
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_against_the_server_of_vllm(vllm_server: tuple[str, Path]) -> None:
    from almost_eval.engines.hf import HFEngine

    url, checkpoint = vllm_server
    one = generation_engine("almost", EngineOptions("openai", base_url=url))
    prompts = ["The cat", "Hello world", "the door. The dog"]
    greedy = SamplingParams(max_new_tokens=12, stop=("at",))
    ours, theirs = one.generate(prompts, greedy), HFEngine(str(checkpoint), dtype="float32").generate(prompts, greedy)
    assert [(row[0].text.rstrip("\ufffd"), row[0].finish_reason) for row in ours] == [
        (row[0].text.rstrip("\ufffd"), row[0].finish_reason) for row in theirs
    ]
    sampled = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, n=3, seed=1)
    whole = one.generate(prompts, sampled)
    assert len({completion.text for row in whole for completion in row}) == 9
    assert one.generate(prompts[1:], sampled) == whole[1:]
    with pytest.raises(InputError, match=r"refuses the request \(400\): .*128"):
        one.generate(["The cat"], SamplingParams(max_new_tokens=500))
    with pytest.raises(InputError, match="serves no model 'almots'; did you mean 'almost'"):
        generation_engine("almots", EngineOptions("openai", base_url=url))
