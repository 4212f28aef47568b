"""The evaluation of policies on small real models: what can be measured is, and what cannot is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from changed import change_config
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from almost_eval.compare.tax.tasks import AnswerJudge
from almost_eval.errors import InputError
from almost_eval.files import write_rows
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.run.store import read_samples, read_spec
from almost_eval.types import Message, SampleRecord
from almost_train.common.stage import StageChanged
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


@pytest.fixture(scope="module")
def policies(tiny_checkpoint: Callable[[str], Path]) -> dict[str, Path | str]:
    return {"sft": tiny_checkpoint("llama-gqa"), "rlsf": tiny_checkpoint("llama-tied")}


def evaluate(
    prompts: Path, policies: dict[str, Path | str], output: Path, **changes: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    options: dict[str, Any] = {"settings": SETTINGS, "reward_model": shipped("nano/reward"), "reference": "sft"}
    result = evaluate_policies(prompts=prompts, policies=policies, output=output, **{**options, **changes})
    assert json.loads((output / "result.json").read_text())["metrics"] == result["metrics"]
    # A table and a picture come of it whatever could not be measured.
    assert shown(result["metrics"])
    assert draw(output, [StageReport("evaluation", "made", 1.0, result)])
    metrics: dict[str, dict[str, dict[str, Any]]] = result["metrics"]
    return metrics


Whole = tuple[Path, dict[str, dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def whole(prompts: Path, policies: dict[str, Path | str], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An evaluation of both policies with nothing odd, to be read: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("evaluated") / "whole"
    return folder, evaluate(prompts, policies, folder)


def answered(output: Path, policy: str) -> dict[str, SampleRecord]:
    """The answers of a policy by the prompt's id."""
    return {record.sample.id: record for record in read_samples(output / policy / "answers")}


def shown(metrics: dict[str, Any]) -> str:
    """The table as it is printed."""
    console = Console(width=110, file=StringIO())
    console.print(policy_table(metrics))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def words(metrics: dict[str, Any]) -> str:
    """The same in one line: notes are wrapped."""
    return " ".join(shown(metrics).split())


def changed_copy(model: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(model, folder)
    change_config(folder, **config)
    return folder


def logprob(model: Path | str, prompt: list[int], answer: list[int]) -> float:
    """Sum of log p of the answer's ids after the prompt's, nats, the plain way."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + answer])).logits[0]  # (T, V)
    scores = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]  # (answer, V)
    return float(scores[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_kl_is_that_of_the_sampled_tokens(policies: dict[str, Path | str], whole: Whole) -> None:
    folder, metrics = whole
    records = answered(folder, "rlsf").values()
    tokenizer = AutoTokenizer.from_pretrained(policies["rlsf"])
    differences, as_text, lengths = [], [], []
    for record in records:
        prompt = tokenizer(f"\n\nHuman: {record.sample.metadata['prompt']}\n\nAssistant:")["input_ids"]
        [ids], [answer] = record.outputs["token_ids"], record.outputs["completions"]
        # Stored as it was written, the space in front of it too; its length is without.
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == answer.strip()
        lengths.append(len(answer.strip()))
        differences.append(logprob(policies["rlsf"], prompt, ids) - logprob(policies["sft"], prompt, ids))
        as_text.append(tokenizer(answer, add_special_tokens=False)["input_ids"] == ids)
    assert any(record.outputs["completions"][0] != record.outputs["completions"][0].strip() for record in records)
    assert not all(as_text)  # a random model writes what its tokenizer would encode in another way
    assert metrics["rlsf"]["kl"]["value"] == pytest.approx(sum(differences) / len(records), abs=1e-3)
    assert metrics["rlsf"]["kl"]["n"] == len(records)
    assert metrics["rlsf"]["characters"]["value"] == sum(lengths) / len(records)
    assert "kl" not in metrics["sft"]


def test_a_template_that_adds_to_the_bos_token(
    prompts: Path, policies: dict[str, Path | str], whole: Whole, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policies["rlsf"])
    policy = shutil.copytree(policies["rlsf"], tmp_path / "policy")
    (policy / "chat_template.jinja").write_text(
        "{{ bos_token + '\\n\\nHuman: ' + messages[0]['content'] + '\\n\\nAssistant:' }}"
    )
    metrics = evaluate(prompts, {**policies, "rlsf": policy}, tmp_path / "out")
    assert metrics["rlsf"]["reward"]["n"] == metrics["rlsf"]["kl"]["n"] == 4
    # BOS is read once: the same prompts as without the template, so the same answers.
    assert tokenizer.bos_token == "<s>"
    assert metrics == whole[1]


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
    prompts: Path, policies: dict[str, Path | str], whole: Whole, tmp_path: Path
) -> None:
    conversations = [
        (Message("user", r.sample.metadata["prompt"]), Message("assistant", r.outputs["completions"][0].strip()))
        for r in answered(whole[0], "rlsf").values()
    ]
    reader = HFRewardModel("nano/reward", device="cpu")
    lengths = reader.lengths(conversations)
    limit = max(lengths) - 1
    short = changed_copy(shipped("nano/reward"), tmp_path / "reward", max_position_embeddings=limit)
    metrics = evaluate(prompts, policies, tmp_path / "out", reward_model=short)["rlsf"]
    fitting = [c for c, length in zip(conversations, lengths, strict=True) if length <= limit]
    assert 0 < len(fitting) < 4
    assert (metrics["reward"]["n"], metrics["reward"]["unscored"]) == (len(fitting), 4 - len(fitting))
    # A mean over the short answers alone would flatter or blame: it is withheld, as by `almost-eval tax`.
    assert metrics["reward"]["value"] is None
    assert f"{4 - len(fitting)} of 4 samples have a prompt that does not fit" in words({"rlsf": metrics})
    rewards = {r.sample.id: r.score.value for r in read_samples(tmp_path / "out" / "rlsf" / "rewards")}
    known = [value for value in rewards.values() if value is not None]
    assert sorted(known) == pytest.approx(sorted(reader.score(fitting)), abs=1e-5)
    assert metrics["characters"]["n"] == metrics["kl"]["n"] == 4


def test_a_reward_model_that_can_read_no_answer_does_not_end_the_evaluation(
    prompts: Path, policies: dict[str, Path | str], tmp_path: Path
) -> None:
    short = changed_copy(shipped("nano/reward"), tmp_path / "reward", max_position_embeddings=4)
    metrics = evaluate(prompts, policies, tmp_path / "out", reward_model=short)
    for by_name in metrics.values():
        assert (by_name["reward"]["value"], by_name["reward"]["n"], by_name["reward"]["unscored"]) == (None, 0, 4)
    assert "rlsf, reward: withheld, as 4 of 4 samples have a prompt that does not fit" in words(metrics)


def test_an_answer_that_the_reference_cannot_read_whole_has_no_kl(
    prompts: Path, policies: dict[str, Path | str], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policies["sft"])
    lengths = [len(tokenizer(f"\n\nHuman: {text}\n\nAssistant:")["input_ids"]) for text in PROMPTS]
    write_rows(tmp_path / "one.jsonl", [{"id": "p", "prompt": PROMPTS[0]}, {"id": "q", "prompt": PROMPTS[1]}])
    # Room for an answer of one token, and none for what the other policy wrote.
    limit = min(lengths) + 1
    short = changed_copy(Path(policies["sft"]), tmp_path / "sft", max_position_embeddings=limit)
    settings = EvaluationSettings(max_new_tokens=1, device="cpu")
    metrics = evaluate(tmp_path / "one.jsonl", {**policies, "sft": short}, tmp_path / "out", settings=settings)
    assert (metrics["sft"]["finished"]["n"], metrics["sft"]["finished"]["unscored"]) == (1, 1)
    assert (metrics["rlsf"]["kl"]["n"], metrics["rlsf"]["kl"]["unscored"]) == (1, 1)


def test_a_prompt_may_fill_the_context_up_to_its_answer(policies: dict[str, Path | str], tmp_path: Path) -> None:
    write_rows(tmp_path / "one.jsonl", [{"id": "p", "prompt": "Hello"}])
    tokenizer = AutoTokenizer.from_pretrained(policies["sft"])
    used = len(tokenizer("\n\nHuman: Hello\n\nAssistant:")["input_ids"])
    for room, n in ((8, 1), (7, 0)):
        short = changed_copy(Path(policies["sft"]), tmp_path / f"sft-{room}", max_position_embeddings=used + room)
        one: dict[str, Path | str] = {"sft": short}
        if n:
            assert evaluate(tmp_path / "one.jsonl", one, tmp_path / "out")["sft"]["reward"]["n"] == 1
        else:
            message = f"no prompt leaves room for 8 new tokens in the context of {used + 7} of "
            with pytest.raises(InputError, match=message):
                evaluate(tmp_path / "one.jsonl", one, tmp_path / "none")


def test_a_prompt_that_leaves_no_room_is_unscored(policies: dict[str, Path | str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "short", "prompt": "Hello"}, {"id": "long", "prompt": "cat " * 300}]
    write_rows(prompts, rows)

    judge = AnswerJudge("kind", lambda prompt, answer: {"oracle": 1.0})
    metrics = evaluate(prompts, policies, tmp_path / "out", judge=judge)
    for by_name in metrics.values():
        assert {(metric["n"], metric["unscored"]) for metric in by_name.values()} == {(1, 1)}
    assert answered(tmp_path / "out", "rlsf")["long"].score.reason == "context_too_long"
    assert "rlsf, reward: 1 of 2 not measured" in shown(metrics)
    write_rows(prompts, rows[1:])
    with pytest.raises(InputError, match="no prompt leaves room for 8 new tokens in the context of 256"):
        evaluate(prompts, policies, tmp_path / "none")


def test_what_was_answered_before_a_kill_is_kept(
    prompts: Path, policies: dict[str, Path | str], whole: Whole, tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "killed")
    (tmp_path / "killed" / "result.json").unlink()
    shutil.rmtree(tmp_path / "killed" / "rlsf" / "rewards")
    file = tmp_path / "killed" / "rlsf" / "answers" / "samples.jsonl"
    (file.parent / "results.json").unlink()
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:20], encoding="utf-8")  # a line cut short
    assert evaluate(prompts, policies, tmp_path / "killed") == whole[1]
    assert sorted(file.read_text(encoding="utf-8").splitlines(keepends=True)) == sorted(lines)


@pytest.mark.slow
def test_there_is_no_kl_between_two_tokenizers(prompts: Path, policies: dict[str, Path | str], tmp_path: Path) -> None:
    metrics = evaluate(prompts, {**policies, "vanilla": shipped("nano/vanilla-small")}, tmp_path)
    assert (metrics["vanilla"]["kl"]["value"], metrics["vanilla"]["kl"]["unscored"]) == (None, 4)
    assert metrics["vanilla"]["reward"]["n"] == metrics["rlsf"]["kl"]["n"] == 4


def test_answers_cut_at_the_limit_are_counted_and_shown(policies: dict[str, Path | str], whole: Whole) -> None:
    folder, metrics = whole
    for policy, by_name in metrics.items():
        reasons = [record.outputs["finish_reasons"][0] for record in answered(folder, policy).values()]
        assert by_name["cut"]["value"] == reasons.count("length") > 0
        assert (by_name["cut"]["n"], by_name["cut"]["unscored"]) == (4, 0)
    (row,) = (line for line in shown(metrics).splitlines() if "cut at the limit of new tokens" in line)
    assert [cell.strip() for cell in row.split("│")[2:4]] == [str(metrics[p]["cut"]["value"]) for p in policies]


def test_how_answers_were_sampled_is_recorded(prompts: Path, policies: dict[str, Path | str], tmp_path: Path) -> None:
    settings = EvaluationSettings(max_new_tokens=8, temperature=0.7, top_p=0.9, stop=("Human",), seed=3, device="cpu")
    evaluate(prompts, policies, tmp_path, settings=settings, judge=AnswerJudge("kind", lambda *_: {"kind": 1.0}))
    spec = read_spec(tmp_path / "rlsf" / "answers")
    expected = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "stop": ["Human"], "judge": "kind"}
    assert spec["settings"] == {**expected, "n_prompts": 4}
    assert spec["seed"] == 3


@pytest.mark.slow
def test_an_evaluation_that_was_begun_elsewhere_is_made_anew_by_a_pipeline(
    prompts: Path, policies: dict[str, Path | str], tmp_path: Path
) -> None:
    evaluate(prompts, policies, tmp_path)
    (tmp_path / "result.json").unlink()
    file = tmp_path / "sft" / "answers" / "spec.json"
    spec = json.loads(file.read_text())
    file.write_text(json.dumps({**spec, "versions": {**spec["versions"], "torch": "1.0"}}))
    with pytest.raises(StageChanged, match=r'was made with other settings \(versions.torch was "1.0"'):
        evaluate(prompts, policies, tmp_path)
