"""Several servers of one reward model as one: shared work, a death, and which are refused before the start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_endpoint import SECRET, Answer, Endpoint, failed

from almost_eval.errors import InputError
from almost_eval.models.endpoints import KEYS
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.rewards.http import PARITY, HTTPRewardModel
from almost_eval.types import Message

CONVERSATIONS = [
    (Message("user", "What does the otter eat?"), Message("assistant", f"It eats {n} fish a day.")) for n in range(24)
]


@pytest.fixture(scope="module")
def truth() -> list[float]:
    return HFRewardModel("nano/seeded-reward", device="cpu").score(CONVERSATIONS)


@pytest.fixture(scope="module")
def reward_of(truth: list[float]) -> dict[str, float]:
    """The text of an answer -> its raw logit, from the real reward model."""
    model = HFRewardModel("nano/seeded-reward", device="cpu")
    known = dict(zip((one[-1].content for one in CONVERSATIONS), truth, strict=True))
    return known | dict(zip((one[-1].content for one in PARITY), model.score(PARITY), strict=True))


@pytest.fixture
def servers(reward_of: dict[str, float]) -> Iterator[list[Endpoint]]:
    """Three servers of the same reward model, of which a test may make others."""
    three = [Endpoint() for _ in range(3)]
    for server in three:
        server.answer = serving(reward_of)
    yield three
    for server in three:
        server.close()


def serving(
    reward_of: dict[str, float], kind: str = "rewards", offset: float = 0.0, seconds: float = 0.0, name: str = "almost"
) -> Callable[[dict[str, Any]], Answer]:
    """The answers of a server that takes some time for each, and whose rewards are off by `offset`."""

    def answer(request: dict[str, Any]) -> Answer:
        if ("conversations" in request) != (kind == "rewards"):
            return failed(404, "Not Found")
        time.sleep(seconds)
        asked = request["conversations"] if kind == "rewards" else [request["messages"]]
        rewards = [reward_of[one[-1]["content"]] + offset for one in asked]
        if kind == "rewards":
            return 200, {"model": name, "rewards": rewards}
        value = rewards[0] if request["use_activation"] is False else 1 / (1 + 2.718281828459045 ** -rewards[0])
        return 200, {"model": name, "data": [{"probs": [value]}]}

    return answer


def model(servers: list[Endpoint], **options: Any) -> HTTPRewardModel:
    return HTTPRewardModel(base_url=",".join(server.url for server in servers), **options)


def worked(server: Endpoint) -> int:
    """Conversations of the work that a server had, without the probes."""
    probes = {one[-1].content for one in PARITY}
    last = (request.get("messages") or request["conversations"][0] for request in server.requests)
    return sum(messages[-1]["content"] not in probes for messages in last)


@pytest.mark.parametrize("kind", ["rewards", "classify"])
def test_equal_servers_share_the_work_and_the_rewards_are_those_of_one(
    servers: list[Endpoint],
    truth: list[float],
    reward_of: dict[str, float],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEYS[0], SECRET)
    for server in servers:
        server.answer = serving(reward_of, kind, seconds=0.01)
    together = model(servers, concurrency=6)
    assert together.score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
    assert sum(map(worked, servers)) == len(CONVERSATIONS)
    assert min(map(worked, servers)) >= len(CONVERSATIONS) // 6
    assert (together.kind, together.model, together.warnings) == (kind, "almost", [])
    assert together.settings()["base_url"] == ",".join(server.url for server in servers)
    assert {head["authorization"] for server in servers for head in server.headers} == {f"Bearer {SECRET}"}


def test_a_server_that_dies_is_replaced_and_named(
    servers: list[Endpoint], truth: list[float], reward_of: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    dying, usual = servers[0], serving(reward_of, seconds=0.01)

    def answer(request: dict[str, Any]) -> Answer:
        if worked(dying) > 2:
            dying.server.socket.close()
            raise ConnectionAbortedError  # the connection ends without an answer
        return usual(request)

    dying.answer = answer
    together = model(servers, concurrency=6)
    assert together.score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
    assert together.warnings == [f"lost on the way: {dying.url}"]
    assert f"{dying.url} is lost; what it had goes to the others" in capsys.readouterr().err


def test_a_slow_server_gets_little(servers: list[Endpoint], truth: list[float], reward_of: dict[str, float]) -> None:
    servers[0].answer = serving(reward_of, seconds=0.5)
    for server in servers[1:]:
        server.answer = serving(reward_of, seconds=0.01)
    assert model(servers, concurrency=6).score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
    assert worked(servers[0]) <= 5


def test_one_that_is_down_is_left_out_and_said(
    servers: list[Endpoint], truth: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    servers[1].close()
    together = model(servers)
    assert together.score(CONVERSATIONS[:3]) == pytest.approx(truth[:3], abs=1e-5)
    assert together.warnings == [f"lost on the way: {servers[1].url}"]
    assert f"{servers[1].url} is not reachable; the run goes on with the other 2" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["rewards", "classify"])
@pytest.mark.parametrize("offset", [0.5, float("nan")])
def test_one_with_other_rewards_is_refused_by_name(
    servers: list[Endpoint], reward_of: dict[str, float], kind: str, offset: float
) -> None:
    for server in servers:
        server.answer = serving(reward_of, kind)
    near, far = servers[0], servers[2]
    near.answer = serving(reward_of, kind, 0.01)
    model(servers).check()  # as half precision may do
    far.answer = serving(reward_of, kind, offset)
    with pytest.raises(InputError, match=f"{far.url} gives other rewards|{far.url} gives no rewards"):
        model(servers).score(CONVERSATIONS)
    assert not any(map(worked, servers))


@pytest.mark.parametrize(("kind", "name"), [("classify", "almost"), ("rewards", "another")])
def test_one_of_another_kind_or_name_is_refused_by_name(
    servers: list[Endpoint], reward_of: dict[str, float], kind: str, name: str
) -> None:
    servers[1].answer = serving(reward_of, kind, name=name)
    with pytest.raises(InputError, match=f"{servers[1].url} serves '{name}' by /{kind}, and {servers[0].url} serves"):
        model(servers).check()


def test_the_shortest_context_counts(servers: list[Endpoint], reward_of: dict[str, float]) -> None:
    here = HFRewardModel("nano/seeded-reward", device="cpu")
    for server, length in zip(servers, (64, 32, 128), strict=True):
        card = {"id": "almost", "object": "model", "max_model_len": length}
        server.models = (200, {"object": "list", "data": [card]})
        server.answer = serving(reward_of, "classify")
    together = model(servers, tokenizer=str(here.checkpoint.path))
    together.check()
    assert together.context_length == 32
