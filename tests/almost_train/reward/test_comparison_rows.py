"""Rows of comparisons that cannot be used: each is named by its file and number; empty answers may be left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from almost_eval.errors import DataError, TemplateError
from almost_eval.files import read_json, write_rows
from almost_eval.types import Conversation
from almost_train.dpo.run import DPOSettings, train_dpo
from almost_train.reward.pairs import encode_pairs, read_comparisons, read_pairs
from almost_train.reward.run import RewardSettings, _pair_losses, train_reward

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 4, "max_length": 128, "device": "cpu", "eval_share": 0.3}


def standard(number: int, chosen: str = "It is big.", rejected: str = "no idea") -> dict[str, Any]:
    return {"prompt": f"How big is the cat {number}?", "chosen": chosen, "rejected": rejected}


def conversational(number: int, chosen: str = "It is big.", rejected: str = "no idea") -> dict[str, Any]:
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    question = turn("user", f"How big is the cat {number}?")
    return {"prompt": question, "chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}


def hh_rlhf(number: int, chosen: str = "It is big.", rejected: str = "no idea") -> dict[str, Any]:
    head = f"\n\nHuman: How big is the cat {number}?\n\nAssistant:"
    return {"chosen": f"{head} {chosen}".rstrip(), "rejected": f"{head} {rejected}".rstrip()}


def test_a_template_error_names_the_row(tmp_path: Path) -> None:
    file = write(tmp_path, [standard(0), standard(1, rejected="a cat of whom the template does not want to hear")])

    def encode(conversation: Conversation) -> list[int]:
        if "does not want" in conversation[-1].content:
            raise TemplateError("chat template 'strict' cannot render: not this")
        return [5, 6, len(conversation[-1].content)]

    with pytest.raises(TemplateError, match=r"^\S+comparisons\.jsonl, row 2: chat template 'strict' cannot render"):
        encode_pairs(read_pairs(file).pairs, encode, 64, pad=0)
    # Rows that were left out before it still count.
    file = write(tmp_path, [standard(0, chosen=""), standard(1, rejected="it does not want")])
    with pytest.raises(TemplateError, match=r"comparisons\.jsonl, row 2: "):
        encode_pairs(read_pairs(file, skip_empty=True).pairs, encode, 64, pad=0)


@pytest.mark.parametrize("form", [standard, conversational, hh_rlhf])
def test_an_empty_answer_is_refused_with_its_row_or_left_out(form: Any, tmp_path: Path) -> None:
    file = write(tmp_path, [form(0), form(1, chosen=""), form(2), form(3, rejected=" ")])
    message = (
        r"comparisons\.jsonl, row 2: the chosen answer is empty \(2 of 4 rows have one\); remove them, or leave them "
        r"out with --skip-empty$"
    )
    with pytest.raises(DataError, match=message):
        read_pairs(file)
    pairs = read_pairs(file, skip_empty=True)
    assert [pair.where.rpartition(", ")[2] for pair in pairs.pairs] == ["row 1", "row 3"]
    assert pairs.empty == (2, 4)
    assert [pair.chosen[-1].content for pair in pairs.pairs] == ["It is big."] * 2
    figures = read_comparisons(file, file, margin=False, skip_empty=True).empty_figures()
    rows = {"rows": 2, "first": [2, 4]}
    assert figures == {"empty_answers": rows, "eval_empty_answers": rows}


def test_nothing_but_empty_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: the rejected answer is empty \(1 of 1 rows have one\)"):
        read_pairs(write(tmp_path, [standard(0, rejected="")]), skip_empty=True)


@pytest.mark.parametrize("stage", ["reward", pytest.param("dpo", marks=pytest.mark.slow)])
def test_the_result_says_which_rows_were_left_out(stage: str, tmp_path: Path) -> None:
    file = write(tmp_path, [hh_rlhf(i, chosen="" if i == 4 else "It is big.") for i in range(10)])
    output = tmp_path / "out"

    def train(*, skip_empty: bool) -> None:
        if stage == "reward":
            train_reward(RewardSettings(**SMALL, skip_empty=skip_empty), file, "nano/vanilla-small", output)
        else:
            train_dpo(DPOSettings(**SMALL, skip_empty=skip_empty), file, "nano/sft", output)

    with pytest.raises(DataError, match=r"row 5: the chosen answer is empty"):
        train(skip_empty=False)
    assert not output.exists()
    train(skip_empty=True)
    metrics = read_json(output / "result.json")["metrics"]
    assert metrics["empty_answers"] == {"rows": 1, "first": [5]}
    assert json.loads((output / "stage.json").read_text(encoding="utf-8"))["settings"]["skip_empty"] is True


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_rows(folder / "comparisons.jsonl", rows)
    return folder / "comparisons.jsonl"


def test_margins_of_held_out_rows_fit_the_loss_too(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    write_rows(plain, [standard(0)])
    write_rows(marked, [standard(1) | {"margin": 1.5}])
    with pytest.raises(DataError, match=r"1 of 1 rows of \S+marked\.jsonl have a 'margin', which the loss would leave"):
        read_comparisons(plain, marked, margin=False, skip_empty=False)
    with pytest.raises(DataError, match=r"1 of 1 rows of \S+plain\.jsonl have no 'margin'"):
        read_comparisons(marked, plain, margin=True, skip_empty=False)


def test_a_loss_without_margins_names_no_flag_for_them(tmp_path: Path) -> None:
    marked = write(tmp_path, [standard(1) | {"margin": 1.5}])
    with pytest.raises(DataError, match="which the loss would leave out; remove the column"):
        train_dpo(DPOSettings(**SMALL), marked, "nano/sft", tmp_path / "out")


def test_the_loss_with_margins_by_hand() -> None:
    # Rewards 2 and 0 with margin 1.5, and 0 and 1 with margin 0: differences less margins are 0.5 and -1.
    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor([[2.0], [0.0], [0.0], [1.0]]))

    _, difference, losses = _pair_losses(cast("torch.nn.Module", model), {"margin": torch.tensor([1.5, 0.0])})
    assert difference.tolist() == [2.0, -1.0]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(1.0))], abs=1e-6)


@pytest.mark.parametrize("form", [standard, conversational, hh_rlhf])
def test_pairs_that_repeat_or_contradict_others_are_counted(form: Any, tmp_path: Path) -> None:
    file = write(tmp_path, [form(0), form(1), form(0), form(1, chosen="no idea", rejected="It is big."), form(2)])
    data = read_comparisons(file, None, margin=False, skip_empty=False)
    assert data.repeat_figures() == {"repeated_pairs": 1, "contradicted_pairs": 1}
    assert read_comparisons(write(tmp_path, [form(0)]), None, margin=False, skip_empty=False).repeat_figures() == {}
