"""A tokenizer that would feed the model something else than its text is refused before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import ModelError
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from serving.models import find_model


def _change(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return shutil.copytree(shipped("nano/almost"), tmp_path / "policy")


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    return shutil.copytree(shipped("nano/reward"), tmp_path / "reward")


def _refusals(policy: Path, reward: Path) -> list[str]:
    """What each way of opening a model says; all refuse, each in one line."""
    openers: list[Callable[[], object]] = [
        lambda: HFEngine(str(policy)),
        lambda: HFRewardModel(str(reward)),
        lambda: find_model("policy", str(policy)),
        lambda: find_model("reward", str(reward)),
    ]
    messages = []
    for opener in openers:
        with pytest.raises(ModelError) as refused:
            opener()
        messages.append(str(refused.value))
    assert not any("\n" in message for message in messages)
    return messages


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_replaces_the_pre_tokenizer_is_refused(name: str, policy: Path, reward: Path) -> None:
    for folder in (policy, reward):
        _change(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class=name))
    for message in _refusals(policy, reward):
        assert "does not do what its tokenizer.json says" in message
        assert '"tokenizer_class": "PreTrainedTokenizerFast"' in message
    _change(policy / "tokenizer_config.json", lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast"))
    assert HFEngine(str(policy)).tokenizer is not None


def test_a_tokenizer_that_loses_spaces_by_its_own_file_is_refused(policy: Path, reward: Path) -> None:
    for folder in (policy, reward):
        _change(folder / "tokenizer.json", lambda file: file.update(pre_tokenizer={"type": "Whitespace"}))
    assert all("loses text" in message for message in _refusals(policy, reward))


def _add_token(folder: Path) -> int:
    rows = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": rows, "content": "<|user|>", "special": True, **flags}
    _change(folder / "tokenizer.json", lambda file: file["added_tokens"].append(token))
    return rows


def test_ids_beyond_the_embedding_are_refused(policy: Path, reward: Path) -> None:
    rows = _add_token(policy)
    _add_token(reward)
    for message in _refusals(policy, reward):
        assert f"'<|user|>' with the id {rows} where the embedding has {rows} rows" in message


def test_the_weights_decide_how_many_rows_there_are(policy: Path) -> None:
    rows = _add_token(policy)
    _change(policy / "config.json", lambda config: config.update(vocab_size=rows + 8))  # the weights have fewer
    with pytest.raises(ModelError, match=f"the embedding has {rows} rows"):
        HFEngine(str(policy))


def test_more_rows_than_tokens_are_fine(policy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 64, mean_resizing=False)
    model.save_pretrained(policy)
    assert HFEngine(str(policy)).tokenizer is not None
