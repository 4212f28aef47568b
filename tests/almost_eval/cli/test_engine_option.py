"""`--engine` and its options: what each engine takes, what is refused, and that hf's runs are what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from almost_eval.cli.command_line import options_of
from almost_eval.cli.judge_options import JUDGES_OWN
from almost_eval.cli.main import cli
from almost_eval.cli.options import ENGINE_OPTIONS, engine_options
from almost_eval.engines.build import ENGINES, TAKES, EngineOptions

Command = Callable[..., Any]
TASKS = ("hhh", "truthfulqa", "mmlu", "harness", "verify")


def parameters(command: str) -> dict[str, click.Parameter]:
    return {str(param.name): param for param in cli.commands[command].params}


@pytest.mark.parametrize("command", TASKS)
def test_every_command_has_the_options(command: str) -> None:
    names = {str(param.name) for param in options_of(ENGINE_OPTIONS)}
    assert names <= parameters(command).keys()
    assert {"engine", "base_url", "concurrency", "timeout", "tensor_parallel_size", "kv_cache_gib"} <= names


def test_vicuna_has_every_option_that_generates() -> None:
    """Each field with a flag that some engine takes when it writes; a new one comes by itself."""
    generating = {
        field.name
        for field in fields(EngineOptions)
        if field.metadata["flag"].help and (field.name == "engine" or any(field.name in TAKES[e] for e in ENGINES))
    }
    assert {"attention", "batch_size", "kv_cache_gib", "pipeline_parallel_size"} <= generating
    assert generating <= parameters("vicuna").keys()
    assert not {"tokenizer", "share_prefixes"} & parameters("vicuna").keys()  # these mean nothing to a writer
    # Left out, each is the engine's own choice; two are the judge's, as the table of flags says.
    context = cli.commands["vicuna"].make_context("vicuna", ["--concurrency", "3", "--kv-cache-gib", "2"])
    flags = {name: value for name, value in context.params.items() if name not in JUDGES_OWN}
    assert engine_options(flags) == EngineOptions(kv_cache_gib=2.0)
    assert context.params["concurrency"] == 3


def test_what_is_not_given_is_the_engines_choice() -> None:
    context = cli.commands["hhh"].make_context("hhh", [])
    assert engine_options(context.params) == EngineOptions()
    given = ["--engine", "vllm", "--gpu-memory", "0.5", "--kv-cache-gib", "2", "--batch-size", "3", "--max-length", "9"]
    context = cli.commands["hhh"].make_context("hhh", given)
    assert engine_options(context.params) == EngineOptions(
        "vllm", gpu_memory=0.5, kv_cache_gib=2.0, batch_size=3, max_length=9
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--engine", "vlm"], "unknown engine 'vlm'; did you mean 'vllm'?"),
        (["--gpu-memory", "0.5"], "the engine 'hf' takes no gpu_memory; leave it out, or use the engine vllm"),
        (["--tokenizer", "nano/seeded"], "the engine 'hf' takes no tokenizer; leave it out, or use the engine openai"),
        (["--base-url", "http://x/v1"], "the engine 'hf' takes no base_url"),
        (["--engine", "vllm", "--attention", "sdpa"], "the engine 'vllm' takes no attention"),
        (["--engine", "vllm", "--no-share-prefixes"], "the engine 'vllm' takes no share_prefixes"),
        (["--engine", "openai"], "the engine 'openai' needs an endpoint"),
        (["--engine", "openai", "--base-url", "x"], "base_url is not an http(s) address"),
        (
            ["--engine", "openai", "--base-url", "http://127.0.0.1:9/v1"],
            "is not reachable; start it, or check base_url",
        ),
        (["--engine", "openai", "--base-url", "http://x/v1", "--dtype", "float32"], "'openai' takes no dtype"),
        (["--engine", "vllm", "--max-length", "4096"], "beyond the model's own context of 2048"),
        (["--concurrency", "0"], "0 is not in the range x>=1"),
        (["--timeout", "0"], "0.0 is not in the range x>0"),
        (["--gpu-memory", "2"], "2.0 is not in the range 0<x<=1"),
        (["--protocol", "reward", "--engine", "vllm", "--device", "cpu"], "the reward model on 'vllm' takes no device"),
        (["--protocol", "reward", "--engine", "openai"], "needs an endpoint"),
    ],
)
def test_refused_in_one_line(
    given: list[str], message: str, almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    code, out, err = almost_eval("hhh", *given, "--data", "nano")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_the_spec_of_hf_is_what_it_was(almost_eval: Command, tmp_path: Path) -> None:
    """A run folder of an earlier version must go on: what its spec compares may not change."""
    code, _, err = almost_eval("hhh", "--model", "nano/seeded", "--limit", 1, "--output", tmp_path / "run")
    assert (code, err) == (0, "")
    spec = json.loads((tmp_path / "run/spec.json").read_text())
    assert spec["engine"] == {
        "name": "hf", "dtype": "float32", "device": "cpu", "attention": "auto", "share_prefixes": True,
        "batch_size": None, "batch_tokens": None, "context_length": 2048,
    }  # fmt: skip
    assert set(spec["versions"]) == {
        "python", "almost-toolkit", "torch", "transformers", "tokenizers", "lm_eval", "numpy"
    }  # fmt: skip
    reward = tmp_path / "reward"
    given = ["hhh", "--protocol", "reward", "--model", "nano/seeded-reward", "--limit", 1, "--output", reward]
    assert almost_eval(*given).code == 0
    assert json.loads((reward / "spec.json").read_text())["engine"] == {
        "name": "hf", "dtype": "float32", "device": "cpu", "attention": "auto", "batch_size": None,
        "batch_tokens": None, "context_length": 2048,
    }  # fmt: skip


def test_a_dry_run_on_vllm_loads_nothing(almost_eval: Command) -> None:
    import sys

    loaded = "vllm" in sys.modules
    code, out, err = almost_eval("hhh", "--engine", "vllm", "--limit", 1, "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["context_length"] == 2048
    assert ("vllm" in sys.modules) == loaded
