"""Comparisons: the funnel of filters, what is written, what loads it, and a whole pass with real tiny models."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.errors import DataError, InputError, RunError
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.synthetic.comparisons import ComparisonSettings, synthesize_comparisons
from almost_train.synthetic.filters import broken_rule
from almost_train.synthetic.prompts import PromptSettings, synthesize_prompts
from almost_train.synthetic.responses import Configuration, ResponseSettings, synthesize_responses

OFF = ComparisonSettings(length_rule=False, pairs="all", drop_identical=False)


def write_responses(folder: Path, table: dict[str, list[str]]) -> Path:
    """`{configuration: answers}`; an answer that begins with `!` broke a rule."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in table.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for i, text in enumerate(texts, 1):
                row: dict[str, Any] = {
                    "id": f"p{i:05d}",
                    "prompt": f"Question {i}?",
                    "response": text.lstrip("!"),
                    "configuration": name,
                }
                row |= {"finish_reason": "stop", "rejected": "too_short" if text.startswith("!") else None}
                stream.write(json.dumps(row) + "\n")
    return folder


def rank(folder: Path, *groups: Any) -> Path:
    file = folder / "ranking.yaml"
    file.write_text(json.dumps(list(groups)), encoding="utf-8")  # JSON is YAML
    return file


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Lengths: prompt 1: 30, 20, 10; prompt 2: 5, 50, 50 (the first too short); prompt 3: twice the same, and a BAD."""
    table = {"a": ["a" * 30, "b" * 5, "same"], "b": ["c" * 20, "d" * 50, "same"], "c": ["e" * 10, "f" * 50, "!bad"]}
    return write_responses(tmp_path / "responses", table)


class TestFunnel:
    def test_official(self, three: Path, tmp_path: Path) -> None:
        ranking = rank(tmp_path, "a", "b", "c")
        result = synthesize_comparisons(ComparisonSettings(), three, ranking, tmp_path / "out")
        assert [
            (r["prompt_id"], r["chosen_source"], r["rejected_source"]) for r in rows(tmp_path / "out/comparisons.jsonl")
        ] == [
            ("p00001", "a", "b"),
            ("p00001", "b", "c"),
            ("p00002", "b", "c"),
        ]
        # Nine pairs. p1 keeps two of three, p2 loses a>b and a>c, p3 has a>b only, of two equal texts.
        # The chosen is the longer: 3 of p1, none of p2, the two of p3 with the BAD.
        filters = result["metrics"]["filters"]
        assert {name: tuple(told.values()) for name, told in filters.items()} == {
            "responses": (9, 7, {"bad_response": 2}, 0.5556, 0.4286),
            "length": (7, 5, {"length_rule": 2}, 0.4286, 0.6),
            "one_win_a_rank": (5, 4, {"rank_has_pair": 1}, 0.6, 0.5),
            "identical": (4, 3, {"identical": 1}, 0.5, 0.6667),
        }
        assert list(filters["length"]) == ["in", "out", "dropped", "chosen_longer_in", "chosen_longer_out"]
        assert result["metrics"]["sources"] == {"a > b": 1, "b > c": 2}
        assert (result["metrics"]["comparisons"], result["metrics"]["prompts_with_pairs"]) == (3, 2)
        dropped = rows(tmp_path / "out/comparisons.rejected.jsonl")
        assert [(r["prompt_id"], r["chosen_source"] + r["rejected_source"], r["reason"]) for r in dropped] == [
            ("p00001", "ac", "rank_has_pair"),
            ("p00002", "ab", "length_rule"),
            ("p00002", "ac", "length_rule"),
            ("p00003", "ab", "identical"),
            ("p00003", "ac", "bad_response"),
            ("p00003", "bc", "bad_response"),
        ]

    def test_what_is_not_ranked_is_named(self, three: Path, tmp_path: Path) -> None:
        result = synthesize_comparisons(ComparisonSettings(), three, rank(tmp_path, "b", "c"), tmp_path / "out")
        assert result["metrics"]["not_ranked"] == ["a"]

    def test_a_row(self, three: Path, tmp_path: Path) -> None:
        synthesize_comparisons(ComparisonSettings(), three, rank(tmp_path, "b", "c"), tmp_path / "out")
        assert rows(tmp_path / "out/comparisons.jsonl")[0] == {
            "prompt": [{"role": "user", "content": "Question 1?"}],
            "chosen": [{"role": "assistant", "content": "c" * 20}],
            "rejected": [{"role": "assistant", "content": "e" * 10}],
            "chosen_source": "b",
            "rejected_source": "c",
            "prompt_id": "p00001",
        }

    def test_balance(self, tmp_path: Path) -> None:
        rng = random.Random(0)
        table = {name: ["x" * rng.randint(low, 99) for _ in range(200)] for name, low in (("a", 50), ("b", 1))}
        responses = write_responses(tmp_path / "responses", table)
        ranking = rank(tmp_path, "a", "b")
        plain = synthesize_comparisons(OFF, responses, ranking, tmp_path / "plain")["metrics"]
        settings = ComparisonSettings(length_rule=False, pairs="all", balance_length=True)
        even = synthesize_comparisons(settings, responses, ranking, tmp_path / "even")["metrics"]
        assert plain["chosen_longer"] > 0.7
        found = rows(tmp_path / "even/comparisons.jsonl")
        longer = [len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"]) for r in found]
        assert sum(gap > 0 for gap in longer) == sum(gap < 0 for gap in longer) > 20
        step = even["filters"]["balance"]
        assert step["dropped"] == {"length_balance": step["in"] - step["out"]}
        synthesize_comparisons(settings, responses, ranking, tmp_path / "again")
        assert (tmp_path / "again/comparisons.jsonl").read_bytes() == (tmp_path / "even/comparisons.jsonl").read_bytes()


GOLDEN: dict[str, tuple[dict[str, Any], bool, str]] = {
    "official": ({}, False, "15f7e5da4bb407eb"),
    "all": ({"length_rule": False, "pairs": "all", "drop_identical": False}, False, "783218605c0255d8"),
    "balanced": ({"pairs": "all", "balance_length": True, "seed": 3}, False, "7c86ac89180013bd"),
    "another order in each file": ({}, True, "a93caf79a4520923"),
}
"""Settings, whether the rows of each file are shuffled, and sha256 of what the code before commit 0a3f855 wrote, which
held all answers in memory: both files and the result."""


@pytest.mark.parametrize("case", GOLDEN)
def test_reading_from_disk_changes_no_byte(case: str, tmp_path: Path) -> None:
    """300 prompts in four configurations, two of one rank, with answers that break rules."""
    settings, is_shuffled, expected = GOLDEN[case]
    rng = random.Random(7)
    words = (
        "The answer is plain: water, light and time; I don't know. Human colour é 東京 \u2028 bread Well no yes".split(
            " "
        )
    )
    (tmp_path / "responses").mkdir()
    order = list(range(300))
    for place, name in enumerate("abcd"):
        if is_shuffled:
            rng.shuffle(order)
        draw, lines = random.Random(place), []
        for i in range(300):
            text = " ".join(draw.choices(words, k=draw.randint(0, 30 - 4 * place))) + draw.choice("....?")
            row: dict[str, Any] = {
                "id": f"p{i:05d}",
                "prompt": f"Question {i}?",
                "response": text,
                "finish_reason": "stop",
            }
            row |= {"configuration": name, "rejected": broken_rule(text, 20)}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        file = tmp_path / "responses" / f"{name}.jsonl"
        file.write_text("".join(lines[i] for i in order), encoding="utf-8")
    ranking = rank(tmp_path, "a", ["b", "c"], "d")
    out = tmp_path / "out"
    result = synthesize_comparisons(ComparisonSettings(**settings), tmp_path / "responses", ranking, out)
    told = json.dumps({key: value for key, value in result.items() if key not in ("seconds", "version")})
    content = b"".join((out / f"{name}.jsonl").read_bytes() for name in ("comparisons", "comparisons.rejected"))
    assert hashlib.sha256(content + told.encode()).hexdigest()[:16] == expected


class TestAsIs:
    def test_only_pairs_with_which_it_agrees(self, tmp_path: Path) -> None:
        words = "red green blue fast slow old new tall bird stone".split()
        rng = random.Random(1)
        table = {n: [" ".join(rng.choices(words, k=6)) + "." for _ in range(30)] for n in "ab"}
        table["a"][0], table["b"][1] = "x" * 20_000, table["a"][1]
        responses = write_responses(tmp_path / "responses", table)
        ranking = rank(tmp_path, "a", "b")
        out = tmp_path / "out"
        result = synthesize_comparisons(OFF, responses, ranking, out, as_is_reward_model="nano/seeded-reward")
        kept, dropped = rows(out / "comparisons.jsonl"), rows(out / "comparisons.rejected.jsonl")
        step = result["metrics"]["filters"]["as_is"]
        assert (step["in"], step["out"]) == (30, len(kept))
        assert step["dropped"] == {"as_is_disagrees": len(dropped) - 2, "as_is_tie": 1, "as_is_too_long": 1}
        assert all(row["chosen_as_is_reward"] > row["rejected_as_is_reward"] for row in kept)
        assert dropped[0]["chosen_as_is_reward"] is None
        # The stored scores are the model's own.
        row = kept[3]
        model = HFRewardModel("nano/seeded-reward", device="cpu")
        question = Message("user", row["prompt"][0]["content"])
        answers = [Message("assistant", row[role][0]["content"]) for role in ("chosen", "rejected")]
        rewards = model.score([(question, answer) for answer in answers])
        assert rewards == pytest.approx([row["chosen_as_is_reward"], row["rejected_as_is_reward"]], abs=1e-5)

        # Killed between the scores: every prefix of the log ends in the same bytes.
        log = [
            {"prompt_id": r["prompt_id"], "configuration": r[f"{role}_source"], "reward": r[f"{role}_as_is_reward"]}
            for r in kept
            for role in ("chosen", "rejected")
        ]
        again = tmp_path / "again"
        again.mkdir()
        (again / "stage.json").write_bytes((out / "stage.json").read_bytes())
        text = "".join(json.dumps(row) + "\n" for row in log[:11])
        (again / ".as_is.jsonl").write_text(text + '{"prompt_id": "p0', encoding="utf-8")
        synthesize_comparisons(OFF, responses, ranking, again, as_is_reward_model="nano/seeded-reward")
        for name in ("comparisons.jsonl", "comparisons.rejected.jsonl"):
            assert (again / name).read_bytes() == (out / name).read_bytes()
        assert not (again / ".as_is.jsonl").exists()

    def test_no_reward_model(self, three: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
        ranking, language_model = rank(tmp_path, "a", "b"), str(tiny_checkpoint("llama-gqa"))
        with pytest.raises(InputError, match="Causal"):
            synthesize_comparisons(OFF, three, ranking, tmp_path / "out", as_is_reward_model=language_model)


class TestBadInput:
    def test_unknown_configuration(self, three: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no answers of the ranked configuration 'd'; it has: a, b, c"):
            synthesize_comparisons(OFF, three, rank(tmp_path, "a", "d"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_other_prompts(self, three: Path, tmp_path: Path) -> None:
        write_responses(three, {"b": ["one", "two"]})
        with pytest.raises(DataError, match=r"b\.jsonl does not answer the same prompts as .*a\.jsonl"):
            synthesize_comparisons(OFF, three, rank(tmp_path, "a", "b"), tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"id": "p00001"}, r"b\.jsonl has the id 'p00001' more than once"),
            ({"prompt": "Another?"}, r"b\.jsonl does not answer the same prompts as .*a\.jsonl"),
            ({"response": None}, r"b\.jsonl: the row of 'p00002' has no 'response'"),
            ({"prompt": 3}, r"b\.jsonl, row 2: 'prompt' must be str, and is int"),
        ],
    )
    def test_a_bad_row(self, three: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        of_b = rows(three / "b.jsonl")
        of_b[1] |= change
        (three / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_b), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            synthesize_comparisons(OFF, three, rank(tmp_path, "a", "b"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_nothing_left(self, tmp_path: Path) -> None:
        responses = write_responses(tmp_path / "responses", {"a": ["!x"], "b": ["fine."]})
        with pytest.raises(RunError, match=r"no pair of 1 is left \(bad_response 1\)"):
            synthesize_comparisons(OFF, responses, rank(tmp_path, "a", "b"), tmp_path / "out")


def test_datasets_and_trl_read_it(three: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl.data_utils import is_conversational, maybe_apply_chat_template

    from almost_eval.models.chat import load_template
    from almost_eval.nano.seeded import checkpoint

    synthesize_comparisons(ComparisonSettings(), three, rank(tmp_path, "a", "b", "c"), tmp_path / "out")
    file = str(tmp_path / "out/comparisons.jsonl")
    rows = load_dataset("json", data_files=file, cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows) == 3
    assert is_conversational(rows[0])
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint("nano/seeded-reward")))
    template = load_template("almost")
    assert template is not None
    tokenizer.chat_template = template.source
    told = maybe_apply_chat_template(rows[0], tokenizer)
    assert told["prompt"] + told["chosen"] == f"\n\nHuman: Question 1?\n\nAssistant: {'a' * 30}{tokenizer.eos_token}"


@pytest.mark.slow
def test_trl_trains_on_it(three: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    from almost_eval.models.chat import load_template
    from almost_eval.nano.seeded import checkpoint

    synthesize_comparisons(ComparisonSettings(), three, rank(tmp_path, "a", "b", "c"), tmp_path / "out")
    file = str(tmp_path / "out/comparisons.jsonl")
    model = str(checkpoint("nano/seeded-reward"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = load_template("almost")
    assert template is not None
    tokenizer.chat_template = template.source
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(model),
        args=RewardConfig(output_dir=str(tmp_path / "rm"), max_steps=1, report_to="none", use_cpu=True, bf16=False),
        train_dataset=load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache")),
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 1


def test_the_whole_of_step_one_with_real_models(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Prompts, responses and comparisons from random weights, straight through and with every log cut short."""
    from almost_eval.engines.hf import HFEngine

    data = DataSource("nano", None)
    large, small = (str(tiny_checkpoint(name)) for name in ("llama-gqa", "gpt2"))
    mining = PromptSettings(
        count=6, prompt_set="nano", shots=2, round_size=4, max_new_tokens=8, min_characters=1, overlap=1.0,
        reading="completion",
    )  # fmt: skip
    answering = ResponseSettings(prompt_set="nano", max_new_tokens=12, min_characters=1, rules=())
    configurations = [
        Configuration("large-1", large, "good", 1),
        Configuration("small-0", small, "weak", 0),
        Configuration("large-0", large, "bad", 0, temperature=0.5),
    ]

    def engine_for(model: str) -> HFEngine:
        return HFEngine(model, device="cpu")

    def run(folder: Path) -> None:
        synthesize_prompts(mining, large, folder / "prompts", data=data, engine_for=engine_for)
        prompts = folder / "prompts/prompts.jsonl"
        synthesize_responses(answering, prompts, configurations, folder / "responses", data=data, engine_for=engine_for)
        ranking = rank(tmp_path, "large-1", ["small-0", "large-0"])
        synthesize_comparisons(ComparisonSettings(), folder / "responses", ranking, folder / "comparisons")

    run(tmp_path / "whole")
    assert rows(tmp_path / "whole/comparisons/comparisons.jsonl")
    # A killed run: the same stage.json, some rows in no order, a half line, no result.
    cut = tmp_path / "cut"
    for stage in ("prompts", "responses"):
        (cut / stage).mkdir(parents=True)
        (cut / stage / "stage.json").write_bytes((tmp_path / "whole" / stage / "stage.json").read_bytes())
    lines = (tmp_path / "whole/responses/large-1.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (cut / "responses/large-1.jsonl").write_text(lines[4] + lines[1] + lines[2][:30], encoding="utf-8")
    run(cut)
    files = [p.relative_to(cut) for p in cut.rglob("*.jsonl")]
    assert len(files) == 7
    for file in files:
        assert (cut / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
