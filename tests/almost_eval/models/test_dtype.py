"""What `--dtype auto` stands for, by purpose, size and CPU; the CPU's answer is the one thing that is not real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from almost_eval.engines.build import EngineOptions, generation_engine, loglikelihood_engine
from almost_eval.engines.hf import HFEngine
from almost_eval.judge.answers import ModelSystem, Sampling
from almost_eval.judge.records import Question
from almost_eval.models import loading
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import pick_dtype

MODEL = "llama-gqa"


def dtype_of(engine: object) -> object:
    """As a run records it."""
    assert isinstance(engine, HFEngine)
    return engine.settings()["dtype"]


@pytest.fixture
def able_cpu(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[[str], Path]) -> Iterator[str]:
    """A checkpoint that counts as large, on a CPU that says it computes in bfloat16."""
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(loading, "LARGE", 1000)
    loading.say_bfloat16.cache_clear()
    yield str(tiny_checkpoint(MODEL))
    loading.say_bfloat16.cache_clear()


def test_auto(able_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = find_checkpoint(able_cpu)
    assert pick_dtype("auto", checkpoint, "cpu", "generate") == "bfloat16"
    assert pick_dtype("auto", checkpoint, "cpu", "score") == "float32"
    assert pick_dtype("float32", checkpoint, "cpu", "generate") == "float32"
    assert pick_dtype("auto", checkpoint, "cuda", "generate") == pick_dtype("auto", checkpoint, "cuda", "score")
    monkeypatch.setattr(loading, "LARGE", checkpoint.n_parameters() + 1)
    assert pick_dtype("auto", checkpoint, "cpu", "generate") == "float32"
    monkeypatch.setattr(loading, "LARGE", checkpoint.n_parameters())
    assert pick_dtype("auto", checkpoint, "cpu", "generate") == "bfloat16"
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    assert pick_dtype("auto", checkpoint, "cpu", "generate") == "float32"


def test_parameters_are_counted_without_weights(tiny_checkpoint: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file

    path = tiny_checkpoint(MODEL)
    stored = sum(tensor.numel() for tensor in load_file(path / "model.safetensors").values())
    assert find_checkpoint(str(path)).n_parameters() == stored


def test_built_in_models_stay_float32(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
    assert dtype_of(generation_engine("nano/vanilla-large", EngineOptions(device="cpu"))) == "float32"
    assert "bfloat16" not in capfd.readouterr().err


def test_only_generation_is_in_half_precision(able_cpu: str, capfd: pytest.CaptureFixture[str]) -> None:
    cpu = EngineOptions(device="cpu")
    assert dtype_of(loglikelihood_engine(able_cpu, cpu)) == "float32"
    assert HFEngine(able_cpu, device="cpu").dtype == "float32"
    assert dtype_of(generation_engine(able_cpu, EngineOptions(device="cpu", dtype="float32"))) == "float32"
    assert capfd.readouterr().err == ""
    for _ in range(2):
        assert dtype_of(generation_engine(able_cpu, cpu)) == "bfloat16"
    said = capfd.readouterr().err
    assert said.count("bfloat16") == 1
    assert "--dtype float32" in said


def test_the_spec_of_answers_tells_a_change_of_machine(able_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("1", "hello", "generic")
    sampling, cpu = Sampling(max_new_tokens=4), EngineOptions(device="cpu")
    here = ModelSystem(able_cpu, [question], sampling, cpu).spec()
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    there = ModelSystem(able_cpu, [question], sampling, cpu).spec()
    assert (here["engine"]["dtype"], there["engine"]["dtype"]) == ("bfloat16", "float32")


def test_a_server_answers_in_half_precision_and_rewards_in_full(able_cpu: str) -> None:
    from serving.local.server import LocalServer
    from serving.local.settings import LocalModels

    server = LocalServer.load(LocalModels({"able": able_cpu}, "nano/reward", device="cpu"))
    [policy] = server._policies.values()
    assert str(policy.engine.model.dtype) == "torch.bfloat16"
    assert server.reward is not None
    assert server.reward._model.dtype == "float32"
