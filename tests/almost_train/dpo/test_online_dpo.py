"""Online DPO on the built-in policy with the built-in reward model as judge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from stopping import StopAfter, Stopped

from almost_eval.errors import DataError, InputError, ModelError, RunError
from almost_eval.files import digest_path, read_rows
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.dpo.online import OnlineDPOSettings, train_online_dpo
from almost_train.nano.data import write_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "batch_size": 8,
    "micro_batch_size": 8,
    "max_new_tokens": 20,
    "samples_every": 1,
    "temperature": 1.3,  # the shipped policy is peaked: at 1 half of its pairs are ties
    "device": "cpu",
}
MODELS = ("nano/sft", "nano/reward")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("online") / "prompts.jsonl", 20, pool="train", seed=3)


@pytest.fixture(scope="module")
def whole(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps; the last has four pairs of eight."""
    folder = tmp_path_factory.mktemp("online") / "whole"
    train_online_dpo(OnlineDPOSettings(**SETTINGS | {"save_every": 1}), prompts, *MODELS, folder)
    return folder


def without_speed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_rows(folder / "log.jsonl")]


def test_the_reward_model_chooses(whole: Path) -> None:
    judge = HFRewardModel("nano/reward", device="cpu")
    samples = read_rows(whole / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 1, 1, 2, 2]
    for row in samples:
        talks = [(Message("user", row["prompt"]), Message("assistant", row[side])) for side in ("chosen", "rejected")]
        assert row["rewards"] == pytest.approx(judge.score(talks), abs=1e-4)
        # A point is taken off an answer that does not end.
        scores = [reward - (not ended) for reward, ended in zip(row["rewards"], row["ended"], strict=True)]
        assert scores[0] - scores[1] == pytest.approx(row["margin"], abs=1e-6)
        assert row["margin"] >= 0
        assert row["tie"] == (row["margin"] == 0)
    assert len({row["chosen"] for row in samples}) > 2


def test_the_log_says_what_was_judged(whole: Path) -> None:
    log = read_rows(whole / "log.jsonl")
    assert [row["pairs"] for row in log] == [8, 8, 4]
    # The first update has the reference as its policy: every pair that is no tie has the loss log 2.
    assert log[0]["loss"] == pytest.approx(math.log(2) * (1 - log[0]["ties"] / 8), abs=1e-5)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["kl"] != 0
    assert all(row["reward_margin"] >= 0 and 0 < row["length"] <= 20 for row in log)
    assert (whole / "model" / "README.md").read_text().count("kl_last") == 1


@pytest.mark.slow
def test_stopped_and_cut_otherwise_it_is_the_same_training(prompts: Path, whole: Path, tmp_path: Path) -> None:
    settings = OnlineDPOSettings(**SETTINGS | {"save_every": 1})
    with pytest.raises(Stopped):
        train_online_dpo(settings, prompts, *MODELS, tmp_path / "stopped", progress=StopAfter(3))
    train_online_dpo(settings, prompts, *MODELS, tmp_path / "stopped")
    assert digest_path(tmp_path / "stopped" / "model") == digest_path(whole / "model")
    assert (tmp_path / "stopped" / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert without_speed(tmp_path / "stopped") == without_speed(whole)

    # A draw does not depend on the micro-batch, and a batch gives one gradient.
    cut = OnlineDPOSettings(**SETTINGS | {"micro_batch_size": 2, "sampling_batch_size": 5})
    train_online_dpo(cut, prompts, *MODELS, tmp_path / "cut")
    for one, other in zip(without_speed(tmp_path / "cut"), without_speed(whole), strict=True):
        assert one["ties"] == other["ties"]
        for key in ("loss", "grad_norm", "kl", "reward", "length"):
            assert one[key] == pytest.approx(other[key], abs=1e-4, rel=1e-3)


@pytest.mark.slow
def test_a_lora_raises_the_reward(prompts: Path, tmp_path: Path) -> None:
    settings = OnlineDPOSettings(
        **SETTINGS | {"batch_size": 20, "micro_batch_size": 20, "epochs": 40, "lora_rank": 8, "learning_rate": 3e-3}
    )
    metrics = train_online_dpo(settings, prompts, *MODELS, tmp_path / "lora")["metrics"]
    # The mean of twenty samples moves by .6 from step to step: the first ten steps against the last twenty. Four seeds
    # gave differences of .40 to 1.17.
    rewards = [row["reward"] for row in read_rows(tmp_path / "lora" / "log.jsonl")]
    assert sum(rewards[20:]) / 20 > sum(rewards[:10]) / 10 + 0.2
    assert metrics["kl_last"] > 0
    assert (tmp_path / "lora" / "model" / "adapter_model.safetensors").is_file()


def test_what_cannot_work_is_refused(prompts: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, models: tuple[str, str] = MODELS, **own: Any) -> None:
        with pytest.raises(error, match=match):
            train_online_dpo(OnlineDPOSettings(**SETTINGS | own), prompts, *models, tmp_path / "out")

    refused(InputError, "an empty stop string", stop=("",))
    refused(ModelError, "this needs a .SequenceClassification", models=("nano/sft", "nano/sft"))
    refused(InputError, "batch_size 9", batch_size=9)
    assert not (tmp_path / "out").exists()
    refused(DataError, "none of 20 prompts leaves room", max_new_tokens=100_000)
    refused(DataError, "none of 20 prompts leaves room for max_new_tokens 20 in max_length 21", max_length=21)


def test_a_reward_that_is_not_finite_ends_the_training(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFRewardModel, "score", lambda self, talks: [math.nan] * len(talks))
    with pytest.raises(RunError, match="values of reward are not finite"):
        train_online_dpo(OnlineDPOSettings(**SETTINGS), prompts, *MODELS, tmp_path / "out")
