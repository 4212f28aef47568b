"""A reward model's adapter, merged into its base, and that on vLLM's server: the same rewards for 200 HHH answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import ModelError
from almost_eval.files import read_rows, write_rows
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.rewards.http import HTTPRewardModel
from almost_eval.rewards.vllm import VLLMRewardModel
from almost_eval.types import Conversation, Message
from almost_train.reward.run import RewardSettings, train_reward
from serving.models import find_model
from serving.vllm.launch import VLLMServer

ANSWERS = 200
CHARACTERS = {"nano/vanilla-medium": 120, "smollm2-135m-instruct": 2000}
"""Of an answer, from its end: what a small context has room for."""


def answers(data_root: Path, characters: int) -> list[Conversation]:
    """Answers of Static HHH, each after its question."""
    file = data_root / "github/naver-ai/ALMoST/eval/data/hhh_eval.json"
    pairs = json.loads(file.read_text(encoding="utf-8"))
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    distinct = list(dict.fromkeys(text[-characters:] for text in texts if text.strip()))[:ANSWERS]
    return [(Message("user", "Which?"), Message("assistant", text)) for text in distinct]


@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("nano/vanilla-medium", marks=pytest.mark.slow),
        pytest.param("smollm2-135m-instruct", marks=pytest.mark.real),
    ],
)
def test_adapter_merged_and_served_rewards_agree(
    model: str, data_root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("vllm", reason="serving needs vLLM: pip install 'almost-toolkit[vllm]'")
    dialogues = answers(data_root, CHARACTERS[model])
    assert len(dialogues) == ANSWERS
    # 1. A reward model that is far from its base: trained on the answers themselves, the longer one chosen.
    rows: list[dict[str, Any]] = []
    for first, second in zip(dialogues[:24:2], dialogues[1:24:2], strict=True):
        worse, better = sorted((first[1].content, second[1].content), key=len)
        chosen, rejected = ([{"role": "assistant", "content": text[-120:]}] for text in (better, worse))
        rows.append({"prompt": [{"role": "user", "content": "Which?"}], "chosen": chosen, "rejected": rejected})
    write_rows(tmp_path / "pairs.jsonl", rows)
    base = model if model.startswith("nano/") else str(request.getfixturevalue("real_models").smollm2)
    settings = RewardSettings(
        lora_rank=8,
        merge=True,
        learning_rate=2e-3,
        epochs=2,
        batch_size=4,
        micro_batch_size=4,
        device="cpu",
        skip_special=True,  # one of these answers writes the built-in template's "Assistant:"
    )
    train_reward(settings, tmp_path / "pairs.jsonl", base, tmp_path / "reward")
    log = read_rows(tmp_path / "reward" / "log.jsonl")
    assert log[-1]["loss"] != pytest.approx(log[0]["loss"], abs=1e-2)
    adapter, merged = tmp_path / "reward" / "adapter", tmp_path / "reward" / "model"
    # 2. The same 200 rewards.
    mine = HFRewardModel(str(adapter), device="cpu", dtype="float32").score(dialogues)
    assert len({round(reward, 3) for reward in mine}) > ANSWERS / 4
    assert HFRewardModel(str(merged), device="cpu", dtype="float32").score(dialogues) == pytest.approx(mine, abs=1e-4)
    with VLLMServer("reward", str(merged)) as server:
        server.wait_ready(timeout_s=300)
        served = HTTPRewardModel(server.model, base_url=f"{server.url}/v1").score(dialogues)
    assert served == pytest.approx(mine, abs=1e-4)
    # 3. vLLM in this process holds base and adapter apart. Its server would name the base a model too, whose score head
    #    is in no file: it takes merged weights, and says so.
    if model.startswith("nano/"):
        assert VLLMRewardModel(str(adapter), dtype="float32").score(dialogues) == pytest.approx(mine, abs=1e-4)
    with pytest.raises(ModelError, match=r"vLLM's reward server takes whole checkpoints: .* `almost-train merge "):
        find_model("reward", str(adapter))
