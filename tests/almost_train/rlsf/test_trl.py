"""RLOO and GRPO on TRL's trainers: the batch after the last update, adapters, what breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopping import StopAfter, Stopped

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import RunError
from almost_eval.files import digest_path, read_rows, write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.progress import Progress
from almost_eval.types import LoglikelihoodRequest
from almost_train.rlsf import trl
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf

pytestmark = pytest.mark.usefixtures("one_thread")

ALGORITHMS = ("rloo", "grpo")
SLOW_GRPO = ["rloo", pytest.param("grpo", marks=pytest.mark.slow)]
ANIMALS = "otter panther owl fox bear wolf hare lynx".split()
REQUEST = LoglikelihoodRequest("How big is the cat?", (" Big.", " It is tiny.", " no"))
SMALL: dict[str, Any] = {
    "steps": 3,
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_new_tokens": 10,
    "learning_rate": 5e-3,
    "kl_limit": 1000.0,
    "guard_window": 0,
    "device": "cpu",
}
Play = Callable[..., dict[str, Any]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs RLSF on the nano world into a folder of that name; returns its metrics."""
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"How big is the {a}?"} for a in ANIMALS])

    def run(name: str, progress: Progress | None = None, **changes: Any) -> dict[str, Any]:
        policy = changes.pop("policy", "nano/sft")
        settings = RLSFSettings(**(SMALL | changes))
        result = rlsf(settings, tmp_path / "prompts.jsonl", policy, "nano/reward", tmp_path / name, progress=progress)
        metrics: dict[str, Any] = result["metrics"]
        return metrics

    return run


def logprobs(model: str | Path) -> list[float]:
    return [score.logprob for score in HFEngine(str(model)).loglikelihood([REQUEST])[0]]


# --- the batch after the last update ---


@pytest.mark.parametrize("algorithm", SLOW_GRPO)
def test_the_last_row_is_the_trained_policys(
    algorithm: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Stopped  # while the checkpoints are still there

    monkeypatch.setattr(trl, "save_policy", die)
    with pytest.raises(Stopped):
        play("out", algorithm=algorithm, save_every=1, warmup_ratio=0.5)
    rows = read_rows(tmp_path / "out" / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    # The last has no update: its weights, as TRL saves them after it, are those before it.
    weights = [load_file(tmp_path / "out" / ".work" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[1].items())
    assert not all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert "policy_loss" not in rows[-1]
    assert "learning_rate" not in rows[-1]
    assert rows[-1]["kl"] != 0
    # 3 updates, the first ceil(3 x 0.5) = 2 of them warm-up: 1/2, 2/2, then all of it. None is at rate 0.
    assert [row["learning_rate"] for row in rows[:-1]] == pytest.approx([2.5e-3, 5e-3, 5e-3])
    samples = read_rows(tmp_path / "out" / "samples.jsonl")
    assert {row["step"] for row in samples} == {0, 3}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_last_update_that_breaks_the_policy_is_seen(algorithm: str, play: Play, tmp_path: Path) -> None:
    metrics = play("out", algorithm=algorithm, steps=2, learning_rate=0.3, kl_limit=50.0, save_every=1)
    rows = read_rows(tmp_path / "out" / "log.jsonl")
    assert rows[-1]["kl"] > 50
    assert metrics["stopped"] == "kl"
    assert metrics["policy_step"] == rows[-1]["step"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_while_the_last_batch_is_measured(algorithm: str, play: Play, tmp_path: Path) -> None:
    whole = play("whole", algorithm=algorithm, save_every=1)
    with pytest.raises(Stopped):
        play("killed", StopAfter(3), algorithm=algorithm, save_every=1)  # as the last update is reported
    assert play("killed", algorithm=algorithm, save_every=1) == whole
    assert digest_path(tmp_path / "killed" / "policy") == digest_path(tmp_path / "whole" / "policy")
    rows = [read_rows(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert [[row["reward"], row["kl"]] for row in rows[0]] == [[row["reward"], row["kl"]] for row in rows[1]]


# --- adapters ---


@pytest.mark.parametrize("algorithm", SLOW_GRPO)
def test_an_adapters_reference_is_its_base(
    algorithm: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    made: Callable[..., Any] = trl.make_trainer

    def spy(*arguments: Any) -> Any:
        trainer, watch = made(*arguments)
        seen["reference"] = trainer.ref_model
        seen["adapters"] = list(trainer.model.peft_config)
        seen["trained"] = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        return trainer, watch

    monkeypatch.setattr(trl, "make_trainer", spy)
    metrics = play("out", algorithm=algorithm, lora_rank=4, merge=True, keep_every=2)
    assert (seen["reference"], seen["adapters"]) == (None, ["default"])  # no second copy of anything
    assert all(".lora_" in name for name in seen["trained"])
    rows = read_rows(tmp_path / "out" / "log.jsonl")
    assert rows[0]["kl"] == 0.0
    assert abs(rows[-1]["kl"]) > 1e-3
    assert (metrics["steps"], metrics["stopped"]) == (3, None)
    # The adapter, on the way too, and the whole weights with it merged in.
    adapter, merged, way = (tmp_path / "out" / name for name in ("adapter", "policy", "policies/step-000002"))
    assert find_checkpoint(str(adapter)).path == find_checkpoint("nano/sft").path
    assert not (merged / "adapter_config.json").exists()
    assert logprobs(adapter) == pytest.approx(logprobs(merged), abs=1e-4)
    assert logprobs(adapter) != pytest.approx(logprobs("nano/sft"), abs=1e-2)
    assert logprobs(way) != pytest.approx(logprobs(adapter), abs=1e-3)
    names = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json")
    assert {file.name for file in way.iterdir()} == {*names, "tokenizer_config.json", "README.md"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_with_an_adapter_it_goes_on_to_the_same_bytes(algorithm: str, play: Play, tmp_path: Path) -> None:
    chosen = {"algorithm": algorithm, "lora_rank": 4, "lora_dropout": 0.2, "save_every": 2, "steps": 4}
    play("whole", **chosen)
    with pytest.raises(Stopped):
        play("stopped", StopAfter(3), **chosen)
    kept = list((tmp_path / "stopped" / ".work").glob("checkpoint-*/*.safetensors"))
    assert {file.name for file in kept} == {"adapter_model.safetensors"}
    play("stopped", **chosen)
    play("plain", **chosen | {"lora_dropout": 0.0})
    digests = [digest_path(tmp_path / name / "policy") for name in ("whole", "stopped", "plain")]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_guard_takes_the_adapter_back_to_the_base(algorithm: str, play: Play, tmp_path: Path) -> None:
    metrics = play("out", algorithm=algorithm, lora_rank=4, kl_limit=1e-6, learning_rate=2e-2, save_every=100)
    assert (metrics["stopped"], metrics["policy_step"]) == ("kl", 0)
    assert logprobs(tmp_path / "out" / "policy") == pytest.approx(logprobs("nano/sft"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_policy_that_is_an_adapter_is_its_own_reference(
    rank: int, algorithm: str, play: Play, tmp_path: Path
) -> None:
    play("first", algorithm=algorithm, lora_rank=4)
    start = tmp_path / "first" / "policy"
    metrics = play("second", algorithm=algorithm, lora_rank=rank, policy=str(start), learning_rate=1e-9)
    rows = read_rows(tmp_path / "second" / "log.jsonl")
    assert [row["kl"] for row in rows] == pytest.approx([0] * 4, abs=1e-3)  # TRL's would be the base of the adapter
    assert metrics["stopped"] is None
    assert logprobs(tmp_path / "second" / "policy") == pytest.approx(logprobs(start), abs=1e-3)
    assert (tmp_path / "second" / "base").exists() == bool(rank)


# --- numbers that are not finite ---


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_gradient_that_is_not_finite_keeps_the_last_good_checkpoint(
    rank: int, algorithm: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Callable[..., Any] = trl.make_trainer

    def spoilt(*arguments: Any) -> Any:
        trainer, watch = made(*arguments)
        trained = next(p for p in trainer.model.parameters() if p.requires_grad)
        trained.register_hook(lambda grad: grad * (math.inf if trainer.state.global_step == 2 else 1))
        return trainer, watch

    monkeypatch.setattr(trl, "make_trainer", spoilt)
    chosen = {"algorithm": algorithm, "lora_rank": rank, "save_every": 1, "keep_every": 1, "steps": 4}
    line = r"step 2: 1 of 2 values of loss and gradient are not finite; the last good checkpoint is \S+checkpoint-2;"
    with pytest.raises(RunError, match=line):
        play("out", **chosen)
    out = tmp_path / "out"
    assert not (out / "policy").exists()
    assert sorted(folder.name for folder in (out / "policies").iterdir()) == ["step-000001", "step-000002"]
    for file in (out / ".work" / "checkpoint-2").glob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    # Without the fault the same command goes on from there.
    monkeypatch.setattr(trl, "make_trainer", made)
    assert play("out", **chosen)["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rate_that_is_far_too_high_is_one_line(algorithm: str, play: Play) -> None:
    with pytest.raises(RunError, match=r"step \d: .* are not finite; no checkpoint was saved before it; .* lower"):
        play("out", algorithm=algorithm, learning_rate=1e30, max_grad_norm=1e30)
