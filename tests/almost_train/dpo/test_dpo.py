"""DPO on a tiny model and on the built-in one: the loss by hand, resume, other micro-batches, LoRA, what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopping import StopAfter, Stopped

from almost_eval.errors import DataError, InputError, ModelError, RunError, StoreError
from almost_eval.files import digest_path, read_rows, write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.nano import shipped
from almost_train.common.batches import NO_LOSS
from almost_train.common.templates import keep_template
from almost_train.dpo.loss import preference_loss
from almost_train.dpo.run import DPOSettings, encode_rows, train_dpo
from almost_train.nano.data import write_votes
from almost_train.reward.pairs import read_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 128,
    "eval_share": 0.0,
    "device": "cpu",
}


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.fixture
def base(tiny_checkpoint: Callable[[str], Path]) -> str:
    return str(tiny_checkpoint("llama-gqa"))


@pytest.fixture
def comparisons(tmp_path: Path) -> Path:
    """Ten pairs: short true answers are chosen, long false ones rejected."""
    write_rows(
        tmp_path / "comparisons.jsonl",
        [
            {
                "prompt": message("user", f"what is {i}?"),
                "chosen": message("assistant", "The cat sat on the mat."),
                "rejected": message("assistant", "A dog is a dog" + ", and a dog" * (i % 3)),
            }
            for i in range(10)
        ],
    )
    return tmp_path / "comparisons.jsonl"


# --- the arithmetic ---


def test_the_losses_on_numbers_that_a_reader_can_check() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])
    # h = 3 and 0. -log sigmoid(0.1 * 3) = log(1 + exp(-0.3)) = 0.554355; -log sigmoid(0) = log 2 = 0.693147.
    assert preference_loss(chosen, rejected, beta=0.1).tolist() == pytest.approx([0.554355, 0.693147], abs=1e-6)
    # A fifth of the labels wrong: 0.8 * 0.554355 + 0.2 * log(1 + exp(0.3)) = 0.443484 + 0.2 * 0.854355 = 0.614355.
    smoothed = preference_loss(chosen, rejected, beta=0.1, label_smoothing=0.2)
    assert smoothed.tolist() == pytest.approx([0.614355, 0.693147], abs=1e-6)
    # IPO: (3 - 1 / 0.2)^2 = 4, (0 - 5)^2 = 25.
    assert preference_loss(chosen, rejected, beta=0.1, loss="ipo").tolist() == pytest.approx([4.0, 25.0])


def answer_logprob(model: Any, ids: list[int], labels: list[int]) -> float:
    """By the definition: the sum of log softmax at the answer's tokens, one text at a time."""
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)  # (T, V)
    return sum(float(logits[at - 1, ids[at]]) for at in range(1, len(ids)) if labels[at] != NO_LOSS)


def test_the_trained_loss_is_dpo_of_the_reference_s_log_probabilities(tmp_path: Path) -> None:
    """On nano/sft: two steps, so that policy and reference differ in the second."""
    from transformers import AutoModelForCausalLM

    pairs = write_votes(tmp_path / "votes.jsonl", 6, wrong=0.0, seed=5)
    settings = DPOSettings(
        **SETTINGS | {"batch_size": 6, "micro_batch_size": 2, "epochs": 2, "warmup_share": 0.0, "beta": 0.3}
    )
    train_dpo(settings, pairs, "nano/sft", tmp_path / "dpo")
    first, second = read_rows(tmp_path / "dpo" / "log.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)

    # The same update by hand: AdamW on the mean over the six pairs, clipped; then the loss of the second step.
    tokenizer = load_tokenizer(find_checkpoint("nano/sft"))
    rows, _ = encode_rows(read_pairs(pairs).pairs, tokenizer, keep_template(tokenizer), 128)
    policy: Any = AutoModelForCausalLM.from_pretrained(shipped("nano/sft"), dtype=torch.float32).train()
    reference: Any = AutoModelForCausalLM.from_pretrained(shipped("nano/sft"), dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    def ratio(row: dict[str, Any], side: str) -> torch.Tensor:
        ids, labels = torch.tensor([row[f"{side}_ids"]]), torch.tensor(row[f"{side}_labels"])
        both = [
            model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for model in (policy, reference)
        ]
        return ((both[0] - both[1].detach()) * (labels[1:] != NO_LOSS)).sum()

    loss = torch.stack(
        [-torch.nn.functional.logsigmoid(0.3 * (ratio(r, "chosen") - ratio(r, "rejected"))) for r in rows]
    )
    loss.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
    assert float(norm) == pytest.approx(first["grad_norm"], rel=1e-4)
    optimizer.step()
    with torch.no_grad():
        logs = {
            side: [
                answer_logprob(policy, row[f"{side}_ids"], row[f"{side}_labels"])
                - answer_logprob(reference, row[f"{side}_ids"], row[f"{side}_labels"])
                for row in rows
            ]
            for side in ("chosen", "rejected")
        }
    by_hand = [math.log1p(math.exp(-0.3 * (c - r))) for c, r in zip(logs["chosen"], logs["rejected"], strict=True)]
    assert second["loss"] == pytest.approx(sum(by_hand) / 6, abs=1e-4)
    assert second["loss"] < 0.6
    assert second["chosen_logratio"] == pytest.approx(sum(logs["chosen"]) / 6, abs=1e-3)
    assert second["rejected_logratio"] == pytest.approx(sum(logs["rejected"]) / 6, abs=1e-3)
    assert second["margin"] == pytest.approx(0.3 * (sum(logs["chosen"]) - sum(logs["rejected"])) / 6, abs=1e-3)


def test_the_loss_is_trl_s_own(base: str, comparisons: Path, tmp_path: Path) -> None:
    """TRL's `_compute_loss` on a whole batch gives the loss and gradient that the weighted one does."""
    from almost_train.common.batches import batch_plan, planned_dataset
    from almost_train.dpo.run import filler_row
    from almost_train.dpo.trainer import make_trainer, pair_collator, preference_trainer_class

    checkpoint = find_checkpoint(base)
    tokenizer = load_tokenizer(checkpoint)
    rows, _ = encode_rows(read_pairs(comparisons).pairs, tokenizer, keep_template(tokenizer), 128)
    plan = batch_plan([1] * len(rows), batch_size=4, epochs=1, seed=0)
    collate = pair_collator(2)
    cls, settings = preference_trainer_class(), DPOSettings(**SETTINGS)
    dataset = planned_dataset(rows, filler_row(rows[0]), plan)
    trainer = make_trainer(cls, settings, checkpoint, tokenizer, dataset, tmp_path, collate)
    inputs = collate([{**row, "weight": 1.0} for row in rows])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
        theirs = trainer._compute_loss(trainer.model, {k: v for k, v in inputs.items() if k != "weight"}, False)
        ours = trainer.compute_loss(trainer.model, inputs)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)
    assert float(ours) != pytest.approx(math.log(2), abs=1e-3)


def test_what_an_answer_s_tokens_are(base: str, tmp_path: Path) -> None:
    """Earlier turns and the prompt carry no loss, EOS does; equal texts and long ones are left out and counted."""
    talk = [*message("user", "what?"), *message("assistant", "The cat."), *message("user", "and?")]
    chosen, rejected = message("assistant", "A dog."), message("assistant", "No.")
    rows = [
        {"prompt": talk, "chosen": chosen, "rejected": rejected},
        {"prompt": talk, "chosen": chosen, "rejected": chosen},
        {"prompt": talk, "chosen": message("assistant", "long " * 99), "rejected": rejected},
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    tokenizer: Any = load_tokenizer(find_checkpoint(base))
    pairs = read_pairs(tmp_path / "pairs.jsonl").pairs
    (row,), dropped = encode_rows(pairs, tokenizer, keep_template(tokenizer), 64)
    learnt = {s: tokenizer.decode([x for x in row[f"{s}_labels"] if x != NO_LOSS]) for s in ("chosen", "rejected")}
    assert learnt == {"chosen": " A dog.</s>", "rejected": " No.</s>"}
    assert dropped == {"same_text": 1, "too_long": 1}


# --- the stage ---


@pytest.mark.slow
def test_a_batch_gives_one_gradient_however_it_is_cut(base: str, comparisons: Path, tmp_path: Path) -> None:
    logs = []
    for name, micro in (("two", 2), ("eight", 8)):  # ten pairs in batches of eight: the second has six fillers
        settings = DPOSettings(**SETTINGS | {"batch_size": 8, "micro_batch_size": micro})
        train_dpo(settings, comparisons, base, tmp_path / name)
        logs.append(read_rows(tmp_path / name / "log.jsonl"))
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "margin", "accuracy", "chosen_logratio"):
            assert one[key] == pytest.approx(other[key], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_the_policy_learns_what_is_chosen(base: str, comparisons: Path, tmp_path: Path) -> None:
    settings = DPOSettings(**SETTINGS | {"epochs": 8, "eval_share": 0.2})
    result = train_dpo(settings, comparisons, base, tmp_path / "dpo")
    metrics = result["metrics"]
    assert metrics["train_pairs"] == 8
    assert metrics["held_out"]["rows"] == 2
    assert metrics["held_out"]["accuracy"] == 1.0
    assert metrics["held_out"]["loss"] < 0.5
    log = read_rows(tmp_path / "dpo" / "log.jsonl")
    assert log[-1]["loss"] < 0.5 < log[0]["loss"]
    assert (tmp_path / "dpo" / "model" / "README.md").is_file()
    assert train_dpo(settings, comparisons, base, tmp_path / "dpo") == result  # done: nothing is trained again
    with pytest.raises(StoreError, match=r"settings \(beta was 0.1, is 0.2\)"):
        train_dpo(
            DPOSettings(**SETTINGS | {"epochs": 8, "eval_share": 0.2, "beta": 0.2}), comparisons, base, tmp_path / "dpo"
        )


@pytest.mark.slow
def test_stopped_and_run_again_ends_in_the_same_bits(base: str, comparisons: Path, tmp_path: Path) -> None:
    settings = DPOSettings(**SETTINGS | {"epochs": 3, "save_every": 3, "eval_share": 0.2, "eval_every": 2})
    with pytest.raises(Stopped):
        train_dpo(settings, comparisons, base, tmp_path / "stopped", progress=StopAfter(5))
    again = train_dpo(settings, comparisons, base, tmp_path / "stopped")
    whole = train_dpo(settings, comparisons, base, tmp_path / "whole")
    assert again["metrics"] == whole["metrics"]
    assert digest_path(tmp_path / "stopped" / "model") == digest_path(tmp_path / "whole" / "model")
    assert not (tmp_path / "stopped" / ".work").exists()


@pytest.mark.slow
def test_lora_s_reference_is_the_base_and_merge_is_the_same_policy(
    base: str, comparisons: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    settings = DPOSettings(**SETTINGS | {"epochs": 4, "lora_rank": 4, "merge": True, "learning_rate": 1e-2})
    train_dpo(settings, comparisons, base, tmp_path / "dpo")
    log = read_rows(tmp_path / "dpo" / "log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # at first the adapter changes nothing
    assert log[-1]["loss"] < 0.6
    adapter, whole = tmp_path / "dpo" / "adapter", tmp_path / "dpo" / "model"
    names = load_file(adapter / "adapter_model.safetensors")
    assert names
    assert not [name for name in names if ".ref." in name]
    assert not (adapter / "ref").exists()
    assert "library_name: peft" in (adapter / "README.md").read_text()
    assert "library_name: transformers" in (whole / "README.md").read_text()
    merged: Any = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([[0, 5, 9, 20]])
    assert not torch.allclose(merged(ids).logits, plain(ids).logits, atol=1e-3)


def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    base: str, comparisons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("almost_train.common.policy.load_weights", lambda *_, **__: pytest.fail("loaded"))

    def refused(
        match: str, error: type[Exception] = InputError, file: Path = comparisons, policy: str = base, **own: Any
    ) -> None:
        with pytest.raises(error, match=match):
            train_dpo(DPOSettings(**SETTINGS | own), file, policy, tmp_path / "out")

    refused("batch_size 3 is not a multiple of 2", batch_size=3)
    refused("--label-smoothing belongs to the loss sigmoid", loss="ipo", label_smoothing=0.1)
    refused("--optim adamw_8bit needs an NVIDIA GPU", optim="adamw_8bit")
    refused("--attention flash_attention_2 needs an NVIDIA GPU", attention="flash_attention_2")
    refused("--eval-every measures held-out rows, and there are none; give --eval-share", eval_every=2)
    refused("--merge without a rank", merge=True)
    refused("no model at", ModelError, policy="nowhere")
    write_rows(tmp_path / "margin.jsonl", [{**read_rows(comparisons)[0], "margin": 1.0}])
    refused("have a 'margin', which the loss would leave out", DataError, file=tmp_path / "margin.jsonl")
    assert not (tmp_path / "out").exists()
    refused("leaves no pair to train on", DataError, max_length=8)


def test_a_gradient_that_is_not_finite_ends_the_training(base: str, comparisons: Path, tmp_path: Path) -> None:
    settings = DPOSettings(**SETTINGS | {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_share": 0.0})
    with pytest.raises(RunError, match=r"the (loss|gradient) is \w+ at step \d"):
        train_dpo(settings, comparisons, base, tmp_path / "dpo")
    assert not (tmp_path / "dpo" / "model").exists()


@pytest.mark.slow
def test_killed_and_run_again_ends_in_the_same_bits(tmp_path: Path) -> None:
    pairs = write_votes(tmp_path / "votes.jsonl", 400, wrong=0.0, seed=5)
    options = [
        *("--comparisons", str(pairs), "--policy", "nano/sft", "--batch-size", "8", "--micro-batch-size", "8"),
        *("--save-every", "3", "--eval-every", "4", "--max-length", "128", "--device", "cpu", "--json"),
    ]
    command = [sys.executable, "-m", "almost_train.cli", "dpo", *options, "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = killed / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 8):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    results = []
    for folder in (killed, whole):
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["outputs"] == results[1]["outputs"]
