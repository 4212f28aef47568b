"""The evaluation of policies on small real models: what can be measured is, and what cannot is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from almost_eval.errors import InputError
from almost_eval.files import read_rows, write_rows
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies
from almost_train.pipeline.run import StageReport
from almost_train.pipeline.summary import draw, policy_table

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["What is a cat?", "Hello", "Say something true, and then stop.", "1 2 3"]
SETTINGS = EvaluationSettings(max_new_tokens=8, device="cpu", seed=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("evaluation") / "prompts.jsonl"
    write_rows(file, [{"id": f"p{i}", "prompt": text} for i, text in enumerate(PROMPTS)])
    return file


@pytest.fixture
def policies(tiny_checkpoint: Callable[[str], Path]) -> dict[str, Path | str]:
    return {"sft": tiny_checkpoint("llama-gqa"), "rlsf": tiny_checkpoint("llama-tied")}


def evaluate(
    prompts: Path, policies: dict[str, Path | str], output: Path, **changes: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    options: dict[str, Any] = {"settings": SETTINGS, "reward_model": shipped("nano/reward"), "reference": "sft"}
    result = evaluate_policies(prompts=prompts, policies=policies, output=output, **{**options, **changes})
    assert json.loads((output / "result.json").read_text())["metrics"] == result["metrics"]
    # A table and a picture come of it whatever could not be measured.
    policy_table(result["metrics"])
    assert draw(output, [StageReport("evaluation", "made", 1.0, result)])
    metrics: dict[str, dict[str, dict[str, Any]]] = result["metrics"]
    return metrics


def changed_copy(model: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def logprob(model: Path | str, prompt: list[int], answer: list[int]) -> float:
    """Sum of log p of the answer's ids after the prompt's, nats, the plain way."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + answer])).logits[0]  # (T, V)
    scores = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]  # (answer, V)
    return float(scores[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_kl_is_that_of_the_sampled_tokens(prompts: Path, policies: dict[str, Path | str], tmp_path: Path) -> None:
    metrics = evaluate(prompts, policies, tmp_path)
    rows = read_rows(tmp_path / "answers" / "rlsf.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(policies["rlsf"])
    differences, as_text = [], []
    for row in rows:
        prompt = tokenizer(f"\n\nHuman: {row['prompt']}\n\nAssistant:")["input_ids"]
        ids = row["token_ids"]
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == row["answer"]
        differences.append(logprob(policies["rlsf"], prompt, ids) - logprob(policies["sft"], prompt, ids))
        as_text.append(tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"] == ids)
    assert not all(as_text)  # a random model writes what its tokenizer would encode in another way
    assert metrics["rlsf"]["kl"]["value"] == pytest.approx(sum(differences) / len(rows), abs=1e-3)
    assert metrics["rlsf"]["kl"]["n"] == len(rows)
    assert "kl" not in metrics["sft"]


def test_a_template_that_adds_to_the_bos_token(prompts: Path, policies: dict[str, Path | str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policies["rlsf"])
    policy = shutil.copytree(policies["rlsf"], tmp_path / "policy")
    (policy / "chat_template.jinja").write_text(
        "{{ bos_token + '\\n\\nHuman: ' + messages[0]['content'] + '\\n\\nAssistant:' }}"
    )
    metrics = evaluate(prompts, {**policies, "rlsf": policy}, tmp_path / "out")
    assert metrics["rlsf"]["reward"]["n"] == metrics["rlsf"]["kl"]["n"] == 4
    # BOS is read once: the same prompts as without the template, so the same answers.
    plain = evaluate(prompts, policies, tmp_path / "plain")
    assert tokenizer.bos_token == "<s>"
    assert metrics == plain


def test_a_reward_that_is_not_a_number_is_unscored(
    prompts: Path, policies: dict[str, Path | str], tmp_path: Path
) -> None:
    broken = changed_copy(shipped("nano/reward"), tmp_path / "reward")
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    metrics = evaluate(prompts, policies, tmp_path / "out", reward_model=broken)
    for by_name in metrics.values():
        assert (by_name["reward"]["value"], by_name["reward"]["n"], by_name["reward"]["unscored"]) == (None, 0, 4)
        assert by_name["characters"]["n"] == 4


def test_an_answer_that_the_reward_model_cannot_read_whole_is_unscored(
    prompts: Path, policies: dict[str, Path | str], tmp_path: Path
) -> None:
    evaluate(prompts, policies, tmp_path / "whole")
    answers = read_rows(tmp_path / "whole" / "answers" / "rlsf.jsonl")
    conversations = [(Message("user", row["prompt"]), Message("assistant", row["answer"])) for row in answers]
    reader = HFRewardModel("nano/reward", device="cpu")
    lengths = reader.lengths(conversations)
    limit = max(lengths) - 1
    short = changed_copy(shipped("nano/reward"), tmp_path / "reward", max_position_embeddings=limit)
    metrics = evaluate(prompts, policies, tmp_path / "out", reward_model=short)["rlsf"]
    fitting = [c for c, length in zip(conversations, lengths, strict=True) if length <= limit]
    assert 0 < len(fitting) < 4
    assert (metrics["reward"]["n"], metrics["reward"]["unscored"]) == (len(fitting), 4 - len(fitting))
    assert metrics["reward"]["value"] == pytest.approx(sum(reader.score(fitting)) / len(fitting), abs=1e-5)
    assert metrics["characters"]["n"] == metrics["kl"]["n"] == 4


def test_a_prompt_that_leaves_no_room_is_unscored(policies: dict[str, Path | str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "short", "prompt": "Hello"}, {"id": "long", "prompt": "cat " * 300}]
    write_rows(prompts, rows)

    def judge(prompt: str, answer: str) -> dict[str, float | None]:
        return {"oracle": 1.0}

    metrics = evaluate(prompts, policies, tmp_path / "out", judge=judge)
    for by_name in metrics.values():
        assert {(metric["n"], metric["unscored"]) for metric in by_name.values()} == {(1, 1)}
    stored = {row["id"]: row for row in read_rows(tmp_path / "out" / "answers" / "rlsf.jsonl")}
    assert (stored["long"]["answer"], stored["long"]["finish_reason"]) == ("", "context_too_long")
    write_rows(prompts, rows[1:])
    with pytest.raises(InputError, match="no prompt leaves room for max_new_tokens 8 in the context of 256"):
        evaluate(prompts, policies, tmp_path / "none")


def test_what_was_answered_before_a_kill_is_kept(
    prompts: Path, policies: dict[str, Path | str], tmp_path: Path
) -> None:
    whole = evaluate(prompts, policies, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "result.json").unlink()
    file = tmp_path / "killed" / "answers" / "rlsf.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:20], encoding="utf-8")  # a line cut short
    assert evaluate(prompts, policies, tmp_path / "killed") == whole
    assert sorted(file.read_text(encoding="utf-8").splitlines(keepends=True)) == sorted(lines)


def test_there_is_no_kl_between_two_tokenizers(prompts: Path, policies: dict[str, Path | str], tmp_path: Path) -> None:
    metrics = evaluate(prompts, {**policies, "vanilla": shipped("nano/vanilla-small")}, tmp_path)
    assert (metrics["vanilla"]["kl"]["value"], metrics["vanilla"]["kl"]["unscored"]) == (None, 4)
    assert metrics["vanilla"]["reward"]["n"] == metrics["rlsf"]["kl"]["n"] == 4
