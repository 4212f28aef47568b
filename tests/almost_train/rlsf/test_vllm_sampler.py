"""Reinforcement learning that samples on vLLM, in this process and on a server: real models, real weights."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import StopAfter, Stopped

from almost_eval.errors import InputError, RunError
from almost_eval.files import read_rows
from almost_train.rlsf.job import RLSFSettings, check_settings
from almost_train.rlsf.run import rlsf

pytestmark = pytest.mark.usefixtures("one_thread")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

SMALL: dict[str, Any] = {
    "steps": 5,
    "batch_size": 16,
    "micro_batch_size": 8,
    "max_new_tokens": 24,
    "learning_rate": 1e-4,
    "kl_limit": 1000.0,
    "save_every": 2,
    "device": "cpu",
}


def settings(algorithm: str = "ppo", **changes: Any) -> RLSFSettings:
    own = {"mini_batch_size": 8} if algorithm == "ppo" else {}
    return RLSFSettings(algorithm=algorithm, **{**SMALL, **own, "sampler": "vllm", **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["What is a cat?", "Hello", "Say something true, and then stop.", "1 2 3", "Where is Paris?", "a dog"]
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": t}) + "\n" for i, t in enumerate(texts)))
    return {"prompts": prompts, "policy": "nano/sft", "reward_model": "nano/reward"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_rows(folder / "log.jsonl")]


def same_output(one: Path, other: Path) -> None:
    for name in ("policy/model.safetensors", "samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows_of(one) == rows_of(other)


# --- refused before anything is loaded ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "transformers", "parity_limit": 0.5}, "--sampler transformers takes no --parity-limit"),
        ({"sampler": "vllm", "sampler_url": "http://127.0.0.1:1"}, "--sampler vllm takes no --sampler-url"),
        ({"sampler": "vllm-server", "sampler_memory": 0.5}, "--sampler vllm-server takes no --sampler-memory"),
        ({"sampler": "vllm-server"}, "needs --sampler-url"),
        ({"sampler": "vllm-server", "sampler_url": "here"}, "--sampler-url is not an http"),
        ({"lora_rank": 2, "quantize": "4bit"}, "takes no --quantize"),
        ({"temperature": 2.5}, "vLLM takes no temperature above 2"),
        ({"sampler_sleep": True}, "need a GPU"),
    ],
)
@needs_vllm
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    if changes.get("sampler_sleep") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=message):
        check_settings(settings(**changes))


@needs_vllm
def test_several_processes_are_refused_beside_vllm_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="use --sampler vllm-server"):
        check_settings(settings())


# --- in this process ---


@pytest.fixture(scope="module")
def whole(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PPO on vLLM from the start to the end."""
    output = tmp_path_factory.mktemp("ppo") / "whole"
    rlsf(settings(), **world, output=output)
    return output


@needs_vllm
@pytest.mark.slow
def test_every_step_is_certified_after_its_sync(world: dict[str, Any], tmp_path: Path) -> None:
    result = rlsf(settings(steps=20, temperature=0.8), **world, output=tmp_path)
    rows = rows_of(tmp_path)
    assert len(rows) == 21
    assert max(row["sampler_gap"] for row in rows) <= 1e-4
    assert all(row["sampler_tokens"] == pytest.approx(16 * row["length"]) for row in rows)
    assert rows[-1]["kl"] > 0.1  # the weights did change
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert result["metrics"]["sampler_gap_largest"] == max(row["sampler_gap"] for row in rows)
    assert result["metrics"]["steps_beyond_parity_limit"] == 0


@needs_vllm
@pytest.mark.slow
def test_ppo_goes_on_to_the_same_bytes(whole: Path, world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        rlsf(settings(), **world, output=tmp_path, progress=StopAfter(3))
    rlsf(settings(), **world, output=tmp_path)
    same_output(whole, tmp_path)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_trl_is_certified_and_goes_on_to_the_same_bytes(algorithm: str, world: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(algorithm)
    rlsf(chosen, **world, output=tmp_path / "whole")
    with pytest.raises(Stopped):
        rlsf(chosen, **world, output=tmp_path / "killed", progress=StopAfter(3))
    rlsf(chosen, **world, output=tmp_path / "killed")
    same_output(tmp_path / "whole", tmp_path / "killed")
    rows = rows_of(tmp_path / "whole")
    assert len(rows) == 6  # the last is of the trained policy
    assert max(row["sampler_gap"] for row in rows) <= 1e-4
    assert rows[-1]["kl"] != 0


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_an_adapter_is_merged_on_the_way(algorithm: str, world: dict[str, Any], tmp_path: Path) -> None:
    rlsf(settings(algorithm, lora_rank=4, lora_dropout=0.2, learning_rate=3e-3), **world, output=tmp_path)
    rows = rows_of(tmp_path)
    assert max(row["sampler_gap"] for row in rows) <= 1e-4
    assert abs(rows[-1]["kl"]) > 0.01


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_weights_that_stay_behind_are_seen(
    algorithm: str, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If vLLM keeps the weights of the start, the certificate says so; the step is corrected, or the run stops."""
    from almost_train.rlsf.weight_transfer import HandingSender

    monkeypatch.setattr(HandingSender, "send_weights", lambda self: None)
    chosen = settings(algorithm, learning_rate=1e-3, warmup_ratio=0.0)
    corrected = rlsf(chosen, **world, output=tmp_path / "corrected")["metrics"]
    rows = rows_of(tmp_path / "corrected")
    assert rows[0]["sampler_gap"] < 1e-4
    assert rows[-1]["sampler_gap"] > 0.1
    assert corrected["steps_beyond_parity_limit"] >= 3
    assert rows[0]["importance_weight"] == 1.0
    assert rows[-1]["importance_weight"] != 1.0
    stopping = replace(chosen, on_parity="stop")
    with pytest.raises(RunError, match=r"beyond --parity-limit 0\.01"):
        rlsf(stopping, **world, output=tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "result.json").exists()
    if algorithm == "ppo":
        stopped = rows_of(tmp_path / "stopped")
        assert stopped[-1]["sampler_gap"] > 0.01  # the last row says why
        assert stopped[-1]["step"] == len(stopped) - 1
    # The same command may go on with the correction, from where it stopped.
    rlsf(replace(stopping, on_parity="correct"), **world, output=tmp_path / "stopped")
    same_output(tmp_path / "corrected", tmp_path / "stopped")


@needs_vllm
@pytest.mark.slow
def test_weights_that_were_not_sent_are_named(world: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    from almost_train.rlsf.weight_transfer import PolicyWeights

    every = PolicyWeights.__iter__

    def without_a_norm(self: PolicyWeights) -> Iterator[tuple[str, Any]]:
        yield from (pair for pair in every(self) if pair[0] != "model.norm.weight")

    monkeypatch.setattr(PolicyWeights, "__iter__", without_a_norm)
    with pytest.raises(RunError, match=r"does not take the weights of the policy: .*model.norm.weight"):
        rlsf(settings(), **world, output=tmp_path)


# --- on a server ---


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    from serving.vllm.launch import VLLMServer

    backend = json.dumps({"backend": "almost"})
    options = ["--logprobs-mode", "processed_logprobs", "--weight-transfer-config", backend, "--max-model-len", "128"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        with VLLMServer("policy", "nano/sft", options=options) as server:
            server.wait_ready(timeout_s=300)
            yield server.url


@needs_vllm
@pytest.mark.slow
def test_a_server_gives_what_vllm_in_the_process_gives(
    server_url: str, whole: Path, world: dict[str, Any], tmp_path: Path
) -> None:
    chosen = settings(sampler="vllm-server", sampler_url=server_url)
    rlsf(chosen, **world, output=tmp_path)
    assert max(row["sampler_gap"] for row in rows_of(tmp_path)) <= 1e-4
    same_output(whole, tmp_path)


@needs_vllm
@pytest.mark.slow
def test_grpo_on_a_server(server_url: str, world: dict[str, Any], tmp_path: Path) -> None:
    rlsf(settings("grpo", sampler="vllm-server", sampler_url=server_url), **world, output=tmp_path)
    rows = rows_of(tmp_path)
    assert max(row["sampler_gap"] for row in rows) <= 1e-4
    assert rows[-1]["kl"] != 0


@pytest.mark.parametrize(
    ("mode", "backend", "changes", "problem"),
    [
        ("processed_logprobs", "almost", {}, None),
        ("raw_logprobs", "almost", {}, None),  # the temperature is 1
        ("raw_logprobs", "nccl", {"weight_transfer": "nccl"}, None),
        ("raw_logprobs", "almost", {"temperature": 0.8}, "gives raw_logprobs, .* --logprobs-mode processed_logprobs"),
        ("raw_logits", "almost", {}, "gives raw_logits, .* --logprobs-mode raw_logprobs"),
        ("raw_logprobs", None, {}, """takes no weights; start it with .*'{"backend": "almost"}'"""),
        ("raw_logprobs", "nccl", {}, "takes weights by 'nccl'; .* or give another --weight-transfer"),
    ],
)
def test_a_server_of_other_options(
    mode: str, backend: str | None, changes: dict[str, Any], problem: str | None
) -> None:
    from almost_train.rlsf.vllm_sampler import server_problem

    config: dict[str, Any] = {"model_config": {"logprobs_mode": mode}}
    config["weight_transfer_config"] = {"backend": backend} if backend else None
    message = server_problem(config, settings(sampler="vllm-server", **changes))
    assert message is None if problem is None else re.match(problem, message or "")


@needs_vllm
@pytest.mark.slow
def test_a_server_that_is_not_there(world: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(sampler="vllm-server", sampler_url="http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the vLLM server http://127.0.0.1:9 does not answer"):
        rlsf(chosen, **world, output=tmp_path)


@needs_vllm
@pytest.mark.slow
def test_a_server_that_takes_no_weights(world: dict[str, Any], tmp_path: Path, endpoint: Any) -> None:
    chosen = settings(sampler="vllm-server", sampler_url=endpoint.url)
    with pytest.raises(InputError, match="takes no weights; start it with VLLM_SERVER_DEV_MODE=1"):
        rlsf(chosen, **world, output=tmp_path)
