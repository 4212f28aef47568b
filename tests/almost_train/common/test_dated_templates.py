"""A template that writes today's date: a training that goes on tomorrow trains on the texts that it began with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from stopping import StopAfter, Stopped

from almost_eval.files import digest_path, read_json
from almost_eval.models import chat
from almost_eval.models.loading import load_tokenizer
from almost_eval.nano import shipped
from almost_eval.progress import Progress
from almost_train.common.templates import keep_template
from almost_train.dpo.online import OnlineDPOSettings, train_online_dpo
from almost_train.dpo.run import DPOSettings, train_dpo
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft

pytestmark = pytest.mark.usefixtures("one_thread")

DATED = "{{- strftime_now('%d') -}}"
"""In front of the world's own template."""
SMALL: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 4, "save_every": 1}
SUPERVISED: dict[str, Any] = {**SMALL, "epochs": 2, "max_length": 128, "device": "cpu"}
RL: dict[str, Any] = {**SMALL, "steps": 4, "max_new_tokens": 8, "kl_limit": 1000.0, "guard_window": 0, "device": "cpu"}
Stage = Callable[[Path, str, str, Path, Progress], Any]


def sft(data: Path, policy: str, judge: str, output: Path, progress: Progress) -> Any:
    return train_sft(SFTSettings(**SUPERVISED), data / "dialogues.jsonl", policy, output, progress=progress)


def reward(data: Path, policy: str, judge: str, output: Path, progress: Progress) -> Any:
    settings = RewardSettings(**SUPERVISED, eval_share=0.3)
    return train_reward(settings, data / "pairs.jsonl", policy, output, progress=progress)


def dpo(data: Path, policy: str, judge: str, output: Path, progress: Progress) -> Any:
    return train_dpo(DPOSettings(**SUPERVISED), data / "pairs.jsonl", policy, output, progress=progress)


def online(data: Path, policy: str, judge: str, output: Path, progress: Progress) -> Any:
    settings = OnlineDPOSettings(**SUPERVISED, max_new_tokens=8)
    return train_online_dpo(settings, data / "prompts.jsonl", policy, judge, output, progress=progress)


def ppo(data: Path, policy: str, judge: str, output: Path, progress: Progress) -> Any:
    settings = RLSFSettings(**RL, mini_batch_size=4)
    return rlsf(settings, data / "prompts.jsonl", policy, judge, output, progress=progress)


def grpo(data: Path, policy: str, judge: str, output: Path, progress: Progress) -> Any:
    settings = RLSFSettings(**RL, algorithm="grpo", num_generations=2)
    return rlsf(settings, data / "prompts.jsonl", policy, judge, output, progress=progress)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """A policy and a reward model whose template writes the day of the month."""
    folders = {}
    for name in ("nano/sft", "nano/reward"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(shipped(name), folder)
        template = folder / "chat_template.jinja"
        template.write_text(DATED + template.read_text(encoding="utf-8"), encoding="utf-8")
        folders[name] = str(folder)
    return folders


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`on(day)`: what `datetime.now()` says from now on."""

    def set_day(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime(2026, 3, day, 12, tzinfo=tz)

        monkeypatch.setattr(chat, "datetime", Clock)

    return set_day


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in (sft, dpo, online, ppo, grpo)]


@pytest.mark.parametrize("stage", [reward, *SLOW])
def test_goes_on_with_the_date_it_began_with(
    stage: Stage, data: Path, models: dict[str, str], on: Callable[[int], None], tmp_path: Path
) -> None:
    policy, judge = models["nano/sft"], models["nano/reward"]
    on(12)
    whole = stage(data, policy, judge, tmp_path / "whole", Progress())
    with pytest.raises(Stopped):
        stage(data, policy, judge, tmp_path / "stopped", StopAfter(3))
    on(13)
    again = stage(data, policy, judge, tmp_path / "stopped", Progress())
    other = stage(data, policy, judge, tmp_path / "other", Progress())
    model = "policy" if (tmp_path / "whole" / "policy").exists() else "model"
    digests = [digest_path(tmp_path / name / model) for name in ("whole", "stopped", "other")]
    assert digests[0] == digests[1] != digests[2]  # the day does change what is learnt
    assert again["metrics"] == whole["metrics"]
    assert other["metrics"] != whole["metrics"]
    pinned = read_json(tmp_path / "stopped" / "stage.json")["pinned"]
    assert pinned["template_now"] == "2026-03-12T12:00:00"
    # What others load writes their own day.
    template = keep_template(load_tokenizer_of(tmp_path / "stopped" / model))
    assert template.now == "2026-03-13T12:00:00"


def load_tokenizer_of(folder: Path) -> Any:
    from almost_eval.models.checkpoint import find_checkpoint

    return load_tokenizer(find_checkpoint(str(folder), architectures=("CausalLM", "SequenceClassification")))
