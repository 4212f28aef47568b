"""Held-out rows in training: the figures by hand, the best checkpoint kept, also through a stop; packing; the split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import StopAfter, Stopped

from almost_eval.errors import InputError, ModelError
from almost_eval.files import digest_path, read_rows, write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.types import Message
from almost_train.common.batches import NO_LOSS
from almost_train.common.split import opening, split_by_prompt
from almost_train.common.templates import keep_template
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.sft.run import SFTSettings, TrainingRow, packed, train_sft, training_rows

pytestmark = pytest.mark.usefixtures("one_thread")

SFT: dict[str, Any] = {
    "learning_rate": 2e-2,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 128,
    "warmup_share": 0.0,
    "device": "cpu",
}


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def base(tiny_checkpoint: Callable[[str], Path]) -> str:
    return str(tiny_checkpoint("llama-gqa"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve dialogues to learn, and four held-out ones that are answered otherwise: learning makes those worse."""
    learnt, held_out = tmp_path / "learnt.jsonl", tmp_path / "held-out.jsonl"
    write_rows(learnt, [talk(f"what is {i}?", "The cat sat on the mat." if i % 2 else "A dog.") for i in range(12)])
    write_rows(
        held_out, [talk(f"who is {i}?", "The cat sat by the door, and the dog." + " A dog." * i) for i in range(4)]
    )
    return learnt, held_out


def held_out_loss(model: Path, file: Path) -> float:
    """Mean over the answers' tokens, by the definition, one dialogue at a time."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(find_checkpoint(str(model)))
    talks = [tuple(Message(**m) for m in row["messages"]) for row in read_rows(file)]
    rows, _ = training_rows(tokenizer, keep_template(tokenizer), talks, 128)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits, labels = loaded(torch.tensor([row.input_ids])).logits[0, :-1], torch.tensor(row.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=NO_LOSS, reduction="sum"))
            count += int((labels != NO_LOSS).sum())
    return total / count


def test_the_best_checkpoint_is_saved_and_a_stop_changes_nothing(
    base: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    learnt, held_out = files
    settings = SFTSettings(**SFT | {"epochs": 4, "eval_every": 2, "save_every": 5})
    whole = train_sft(settings, learnt, base, tmp_path / "whole", eval_demonstrations=held_out)["metrics"]
    log = read_rows(tmp_path / "whole" / "log.jsonl")
    measured = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    assert list(measured) == [2, 4, 6, 8, 10, 12]
    best = min(measured, key=lambda step: measured[step])
    assert best < 12  # the last one is not the best here, or this test would say nothing
    assert whole["saved_step"] == best
    assert whole["held_out"] == {"rows": 4, "loss": measured[best]}
    assert held_out_loss(tmp_path / "whole" / "model", held_out) == pytest.approx(measured[best], abs=1e-5)
    assert not (tmp_path / "whole" / ".work").exists()

    with pytest.raises(Stopped):
        train_sft(settings, learnt, base, tmp_path / "stopped", eval_demonstrations=held_out, progress=StopAfter(9))
    again = train_sft(settings, learnt, base, tmp_path / "stopped", eval_demonstrations=held_out)["metrics"]
    assert again == whole
    assert digest_path(tmp_path / "stopped" / "model") == digest_path(tmp_path / "whole" / "model")


@pytest.mark.slow
def test_measuring_does_not_change_the_training(base: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    learnt, held_out = files
    logs = []
    for name, every in (("without", 0), ("with", 1)):
        settings = SFTSettings(**SFT | {"epochs": 1, "eval_every": every})
        train_sft(settings, learnt, base, tmp_path / name, eval_demonstrations=held_out if every else None)
        logs.append([(row["loss"], row["grad_norm"]) for row in read_rows(tmp_path / name / "log.jsonl")])
    assert logs[0] == logs[1]


def test_a_reward_model_is_measured_as_its_checkpoint_is(base: str, tmp_path: Path) -> None:
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"what is {i}?"}],
            "chosen": [{"role": "assistant", "content": "The cat sat on the mat."}],
            "rejected": [{"role": "assistant", "content": f"A dog {i}"}],
        }
        for i in range(12)
    ]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    settings = RewardSettings(**SFT | {"learning_rate": 3e-3, "epochs": 3, "eval_every": 1, "eval_share": 0.25})
    metrics = train_reward(settings, tmp_path / "pairs.jsonl", base, tmp_path / "reward")["metrics"]
    log = read_rows(tmp_path / "reward" / "log.jsonl")
    losses = [row["eval_loss"] for row in log]
    assert len(losses) == metrics["steps"]
    assert metrics["saved_step"] == 1 + losses.index(min(losses))
    # The checkpoint as it was saved gives the same figures.
    rows = read_rows(tmp_path / "reward" / "eval.jsonl")
    margins = torch.tensor([row["chosen_reward"] - row["rejected_reward"] for row in rows])
    assert metrics["held_out"]["loss"] == pytest.approx(
        float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-5
    )
    assert metrics["held_out"]["margin"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert metrics["held_out"]["accuracy"] == metrics["eval"]["accuracy"]["value"]


def test_no_prompt_is_on_both_sides() -> None:
    talks = [tuple(Message(**m) for m in talk(f"q{i % 4}", f"a{i}")["messages"]) for i in range(8)]
    split = split_by_prompt(talks, None, opening, 0.25, 0)
    assert len(split.held_out) == 2
    assert not {opening(one) for one in split.held_out} & {opening(one) for one in split.training}
    other = split_by_prompt(talks, talks[:1], opening, 0.25, 0)
    assert (len(other.training), other.dropped) == (6, 2)


# --- packing ---


def test_packing_gives_the_loss_and_gradient_of_the_answers_apart(
    base: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    learnt, _ = files
    logs = []
    for name, own in (("apart", {"batch_size": 12}), ("packed", {"batch_size": 8, "packing": True})):
        settings = SFTSettings(**SFT | {"epochs": 1, **own})  # one step of all either way
        metrics = train_sft(settings, learnt, base, tmp_path / name)["metrics"]
        logs.append(read_rows(tmp_path / name / "log.jsonl")[0])
        assert metrics["steps"] == 1
    assert 1 < metrics["packed_rows"] < 12
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)


def test_packed_rows_hold_every_answer_once() -> None:
    rows = [TrainingRow(list(range(10 * n, 10 * n + n)), [NO_LOSS, *range(n - 1)]) for n in (2, 9, 4, 5, 3)]
    units = packed(rows, 10)
    assert sum(len(unit["input_ids"]) for unit in units) == 23
    assert max(len(unit["input_ids"]) for unit in units) <= 10
    assert sorted(length for unit in units for length in unit["seq_lengths"]) == [2, 3, 4, 5, 9]


def test_a_model_that_would_read_the_answer_before_is_refused(
    tiny_checkpoint: Callable[[str], Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = SFTSettings(**SFT | {"epochs": 1, "packing": True})
    with pytest.raises(ModelError, match="in a packed row an answer would read the one before it"):
        train_sft(settings, files[0], str(tiny_checkpoint("bloom")), tmp_path / "out")


# --- what is refused ---


def test_measurements_without_rows_are_refused(base: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--eval-every measures held-out rows, and there are none; give --eval-share"):
        train_sft(SFTSettings(**SFT | {"eval_every": 2}), files[0], base, tmp_path / "out")
    with pytest.raises(InputError, match="--optim paged_adamw_8bit needs an NVIDIA GPU, and this trains on cpu"):
        train_sft(SFTSettings(**SFT | {"optim": "paged_adamw_8bit"}), files[0], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_attention_reaches_the_model(base: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    """Eager and sdpa are the same sums in another order."""
    logs = []
    for name in ("eager", "sdpa"):
        train_sft(SFTSettings(**SFT | {"epochs": 1, "attention": name}), files[0], base, tmp_path / name)
        logs.append(read_rows(tmp_path / name / "log.jsonl"))
    assert logs[0][-1]["loss"] == pytest.approx(logs[1][-1]["loss"], abs=1e-3)
    assert logs[0] != logs[1]
