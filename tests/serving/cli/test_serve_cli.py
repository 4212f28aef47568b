"""`almost-serve`: what it says and how it ends. No server is started here."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from machine_time import seconds_taken

from almost_eval.nano import shipped
from serving.cli import main as cli

COMMAND = str(Path(sys.executable).with_name("almost-serve"))


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`serve("policy", "--port", 0)`: the command in this process."""
    monkeypatch.delenv("ALMOST_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["almost-serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.serve()
        return Outcome(int(exit.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def vllm() -> None:
    pytest.importorskip("vllm", reason="needs vLLM")


def assert_refused(outcome: Outcome, *words: str) -> None:
    """One line on stderr, nothing on stdout, exit code 2."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize("arguments", [["--help"], ["policy", "--help"], ["all", "--help"]])
def test_help_answers_in_half_a_second(arguments: list[str]) -> None:
    assert min(seconds_taken([COMMAND, *arguments], holds="almost-serve") for _ in range(3)) <= 0.5


def test_help_lists_the_commands(serve: Callable[..., Outcome]) -> None:
    out = serve("--help").out
    assert [out.index(f"\n  {name} ") for name in ("policy", "reward", "gateway", "all")] == sorted(
        out.index(f"\n  {name} ") for name in ("policy", "reward", "gateway", "all")
    )
    assert "passed on" in serve("policy", "--help").out


@pytest.mark.usefixtures("vllm")
class TestRefused:
    def test_a_port_in_use(self, serve: Callable[..., Outcome]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for command in ("policy", "reward", "all"):
                assert_refused(serve(command, "--port", port), f"port {port}", "in use", "give another --port")

    def test_a_host_that_is_not_here(self, serve: Callable[..., Outcome]) -> None:
        assert_refused(serve("policy", "--host", "192.0.2.1"), "cannot listen on 192.0.2.1")

    def test_no_model(self, serve: Callable[..., Outcome], tmp_path: Path) -> None:
        assert_refused(serve("policy", "--model", tmp_path), "is not a model", "config.json")
        assert_refused(serve("reward", "--model", "nano/almost"), "this needs a *SequenceClassification*")
        assert_refused(serve("all", "--reward", "nano/rewrad"), "no built-in model", "did you mean 'nano/reward'?")

    def test_pickles(self, serve: Callable[..., Outcome], tmp_path: Path) -> None:
        model = shutil.copytree(shipped("nano/almost"), tmp_path / "model")
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        assert_refused(serve("policy", "--model", model), "only pickled weights", "--allow-pickle")
        allowed = serve("policy", "--model", model, "--allow-pickle", "--port", 0, "--dry-run")
        assert allowed.code == 0
        assert "--load-format" not in allowed.out

    def test_too_little_memory(self, serve: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")  # GiB
        assert_refused(serve("policy", "--port", 0), "too little memory for nano/almost", "smaller model")

    def test_a_context_too_small(self, serve: Callable[..., Outcome]) -> None:
        refused = serve("policy", "--port", 0, "--max-model-len", "5000")
        assert_refused(refused, "beyond the context of nano/almost, which is 2048 tokens")

    def test_a_key_on_the_command_line(self, serve: Callable[..., Outcome]) -> None:
        refused = serve("policy", "--port", 0, "--api-key", "sk-secret")
        assert_refused(refused, "set ALMOST_API_KEY")
        assert "sk-secret" not in refused.err

    def test_a_word_too_many(self, serve: Callable[..., Outcome]) -> None:
        assert_refused(serve("policy", "nano/almost"), "unexpected argument 'nano/almost'", "--model")

    def test_a_log_that_cannot_be_written(self, serve: Callable[..., Outcome], tmp_path: Path) -> None:
        assert_refused(serve("policy", "--port", 0, "--log", tmp_path / "no" / "log"), "cannot be written")

    def test_options_of_all(self, serve: Callable[..., Outcome]) -> None:
        assert_refused(serve("all", "--policy-options", "'"), "--policy-options", "not a list of options")
        assert_refused(serve("all", "--max-best-of", 0), "max-best-of must be 1 or more")
        assert_refused(serve("all", "--dtype", "float32"), "No such option")


def test_an_unknown_command(serve: Callable[..., Outcome]) -> None:
    assert_refused(serve("polcy"), "did you mean 'policy'?")


def test_vllm_is_missing(serve: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python itself takes for a package that cannot be had
    for command in ("policy", "reward", "all"):
        assert_refused(serve(command), "needs the package 'vllm'", "pip install 'almost-toolkit[vllm]'")


@pytest.mark.usefixtures("vllm")
def test_dry_run_prints_the_command_and_no_key(serve: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALMOST_API_KEY", "sk-secret")
    shown = serve("policy", "--port", 0, "-tp", 2, "--dry-run", "--host", "127.0.0.1", "--stop", "a b")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.count("\n") == 1
    assert "-m serving.vllm.main " in shown.out
    assert shown.out.endswith("-tp 2\n")
    assert 'VLLM_API_KEY="$ALMOST_API_KEY"' in shown.out
    assert f"ALMOST_DEFAULT_STOP='{json.dumps(['a b'])}'" in shown.out
    door = ("--allowed-host", "a.example.org", "--allowed-host", "b.example.org", "--open-metrics")
    everything = serve("all", "--port", 0, "--dry-run", "--policy-options", "--max-model-len 512", *door)
    assert everything.out.rstrip().endswith(" ".join(door))
    policy, reward, gateway = everything.out.splitlines()
    assert policy.endswith("--max-model-len 512")
    assert "--runner pooling" in reward
    assert "VLLM_API_KEY='(random)'" in reward
    assert " gateway --policy-url http://127.0.0.1:" in gateway
    assert "sk-secret" not in shown.out + everything.out
