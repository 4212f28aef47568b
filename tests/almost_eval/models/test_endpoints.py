"""Addresses and keys of OpenAI-compatible endpoints: the same rule for engines, rewards, judges and the chat page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from almost_eval.engines.openai import OpenAIEngine
from almost_eval.errors import InputError
from almost_eval.judge.api.endpoint import JudgeEndpoint
from almost_eval.models.endpoints import BASE_URL, KEYS, EndpointAddress, hide_key, read_key, server_words
from almost_eval.rewards.http import HTTPRewardModel
from serving.chat.client import Endpoint

OURS = "http://127.0.0.1:8000/v1"
OPENAIS = "https://api.openai.com/v1"


def engine(url: str) -> str | None:
    return OpenAIEngine("m", base_url=url)._key


def rewards(url: str) -> str | None:
    return HTTPRewardModel("m", base_url=url)._key


def judge(url: str) -> str | None:
    return JudgeEndpoint("m", url, 1.0)._key


def chat(url: str) -> str | None:
    return Endpoint.with_key_of_environment(url).key


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*KEYS, BASE_URL):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("key_of", [engine, rewards, judge, chat])
def test_one_rule_for_keys(key_of: Callable[[str], str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of(OURS) is None
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    assert key_of(OURS) == "of-openai"
    monkeypatch.setenv("ALMOST_API_KEY", "of-almost\n")  # as `export KEY=$(cat file)` with a stray end of line
    assert key_of(OURS) == "of-almost"
    # A gateway's key is none of OpenAI's business, where there is one for OpenAI.
    assert key_of(OPENAIS) == "of-openai"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key_of(OPENAIS) == "of-almost"
    monkeypatch.setenv("ALMOST_API_KEY", "two words")
    with pytest.raises(InputError, match="ALMOST_API_KEY holds spaces or characters") as caught:
        key_of(OURS)
    assert "words" not in str(caught.value)


def test_a_judge_sends_the_key_that_the_engines_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALMOST_API_KEY", "of-almost")
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    assert JudgeEndpoint("m", OURS, 1.0).connect().api_key == OpenAIEngine("m", base_url=OURS).client.api_key


@pytest.mark.parametrize("url", ["host:8000", "ftp://host/v1", "http://", "http://host:x/v1", "http://[host/v1", "no"])
def test_malformed_addresses(url: str) -> None:
    with pytest.raises(InputError, match="--flag is not an http") as caught:
        EndpointAddress.parse(url, "--flag")
    assert caught.value.__context__ is None


def test_addresses() -> None:
    address = EndpointAddress.parse("http://me:hunter2@127.0.0.1:8000/v1", "--flag")
    assert (address.shown, address.has_user, address.is_local) == (OURS, True, True)
    assert EndpointAddress(OURS + "/?a=b").beside("/version") == "http://127.0.0.1:8000/version"
    hosts = {"api.openai.com": True, "openai.com": True, "openai.com.evil": False, "notopenai.com": False}
    assert {host: EndpointAddress(f"https://{host}/v1").is_openai for host in hosts} == hosts


def test_what_a_server_says_is_one_line_without_keys() -> None:
    said = "Incorrect  key\nmy-key, or sk-abcdef, or sk-ab****yz. " + "x" * 400
    assert server_words(said, "my-key").startswith("Incorrect key *** or ***, or *** xxx")
    assert len(server_words(said, "my-key")) == 300
    assert server_words("a=my-key; b sk-x,de***f", "my-key") == "*** b ***"
    assert hide_key("a my-key b sk-abcdef", "my-key") == "a *** b sk-abcdef"  # a reply is changed nowhere else
    assert hide_key("as it is", None) == "as it is"


def test_no_other_file_reads_a_key() -> None:
    import almost_eval

    root = Path(almost_eval.__file__).parent
    reading = [
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if "environ" in (text := file.read_text(encoding="utf-8")) and any(name in text for name in KEYS)
    ]
    assert reading == ["models/endpoints.py"]
    assert read_key(EndpointAddress(OURS)) is None
    assert not any(os.environ.get(name) for name in KEYS)


@pytest.mark.parametrize("unit", ["x", "*", "sk", "sk-", "-", "x ", "x***y", "my-key"])
def test_a_message_of_megabytes_is_gone_through_once(unit: str) -> None:
    """It took minutes for one long word: the time grew with its square."""
    began = time.process_time()
    assert len(server_words(unit * (2_000_000 // len(unit)), "my-key")) <= 300
    assert time.process_time() - began < 2
