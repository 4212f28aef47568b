"""The data of the study beside the benchmarks: preferences of other sources, human pairs, held-out prompts.

    as-is.jsonl     archived answers to AlpacaEval's prompts, ranked: for the as-is filter (arXiv 2305.13735, 2.1)
    second.jsonl    one half of hh-rlhf's harmless pairs, by people: for a second reward model, which no stage sees
    held-out.jsonl  prompts that no stage trains on: 100 of AlpacaEval's that are not in as-is.jsonl, and the first
                    turns of 100 hh-rlhf dialogues that are not in second.jsonl, which ask for something harmful

Rows are dealt by a digest of their prompt and the seed, so a file does not depend on another's size, and no prompt is
on both sides. Nothing of it is ours to hand on, so it is written into the run's folder and not kept in the project.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.data.sources import DataSource
from almost_eval.errors import DataError
from almost_eval.files import write_rows
from almost_eval.models.chat import parse_dialogue
from almost_eval.progress import Progress
from almost_eval.tasks.base import Prompting
from almost_eval.tasks.hhh import HHH
from almost_eval.types import Conversation, Message
from almost_train.synthetic.comparisons import ComparisonSettings, synthesize_comparisons

RANKED = ("gpt4", "vicuna-13b", "alpaca-7b", "text_davinci_001")
"""Best first. The order is AlpacaEval's own: win rates against text_davinci_003 of 73.8, 64.1, 45.2 and 28.1 %, with
ChatGPT as judge (huggingface.co/microsoft/phi-2/discussions/38, read 2026-11-29)."""
REFERENCE = "gpt4"
"""Whose archived answers stand for good ones."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two whole dialogues, the better one named."""

    cluster: str
    """Pairs with the same words here are not independent: the context that both answers follow."""
    chosen: Conversation
    rejected: Conversation


def prepare(root: Path, folder: Path, *, seed: int, as_is_pairs: int, second_pairs: int, held_out: int) -> None:
    """Write the three files to `folder`.

    Args:
        root: the folder with `hub/`, `alpaca_eval/` and `hh_rlhf/`.
        folder: where to write.
        seed: deals the rows, and draws the pairs that are kept for an even share of longer answers.
        as_is_pairs: at most, of as-is.jsonl.
        second_pairs: at most, of second.jsonl.
        held_out: prompts of each of the two kinds.

    Raises:
        DataError: a file that is absent or is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers = archived_answers(root)
    shared = sorted(set.intersection(*(set(own) for own in answers.values())), key=lambda text: _deal(seed, text))
    asked = shared[-held_out:]
    write_as_is(answers, shared[:-held_out], folder, seed, as_is_pairs)
    first, rest = halves(human_pairs(root), seed)
    write_rows(
        folder / "second.jsonl",
        (
            {"chosen": [m.to_dict() for m in pair.chosen], "rejected": [m.to_dict() for m in pair.rejected]}
            for pair in first[:second_pairs]
        ),
    )
    harmful = list(dict.fromkeys(pair.chosen[0].content for pair in rest))[:held_out]
    prompts = [("alpaca", text) for text in asked] + [("harmful", text) for text in harmful]
    write_rows(
        folder / "held-out.jsonl",
        ({"id": f"{kind}-{number:03d}", "prompt": text} for number, (kind, text) in enumerate(prompts)),
    )


def archived_answers(root: Path) -> dict[str, dict[str, str]]:
    """Model -> prompt -> answer, of the ranked models."""
    answers: dict[str, dict[str, str]] = {}
    for name in RANKED:
        file = root / "alpaca_eval" / f"{name}.json"
        try:
            rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}); name the folder that has alpaca_eval/") from None
        answers[name] = {row["instruction"]: row["output"].strip() for row in rows}
    return answers


def write_as_is(answers: dict[str, dict[str, str]], prompts: Sequence[str], folder: Path, seed: int, most: int) -> None:
    """Pairs by rank, as many with the shorter answer chosen as with the longer: they do not teach length."""
    responses = folder / "archived"
    responses.mkdir(exist_ok=True)
    for name in RANKED:
        rows = [
            {"id": f"a{number:03d}", "prompt": prompt, "response": answers[name][prompt], "rejected": None}
            for number, prompt in enumerate(prompts)
        ]
        write_rows(responses / f"{name}.jsonl", rows)
    (folder / "ranking.yaml").write_text("".join(f"- {name}\n" for name in RANKED), encoding="utf-8")
    settings = ComparisonSettings(pairs="all", length_rule=False, balance_length=True, seed=seed)
    synthesize_comparisons(settings, responses, folder / "ranking.yaml", folder / "comparisons", progress=Progress())
    lines = (folder / "comparisons" / "comparisons.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines.sort(key=lambda line: _deal(seed, line))  # a few pairs of many prompts, not all pairs of a few
    (folder / "as-is.jsonl").write_text("".join(lines[:most]), encoding="utf-8")


# --- pairs to measure reward models on ---


def human_pairs(root: Path) -> list[Pair]:
    """hh-rlhf's harmless-base test pairs: 2,308 of 2,312, as in four a person has the last word, not the assistant."""
    file = root / "hh_rlhf" / "harmless-base-test.jsonl.gz"
    pairs = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            for line in stream:
                row: dict[str, Any] = json.loads(line)
                chosen, rejected = parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])
                if chosen[-1].role == rejected[-1].role == "assistant":
                    pairs.append(Pair(chosen[0].content, chosen, rejected))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); name the folder that has hh_rlhf/") from None
    return pairs


def halves(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Two parts that share no first turn, each in a drawn order."""
    dealt = sorted(pairs, key=lambda pair: _deal(seed, pair.cluster))
    first = [pair for pair in dealt if int(_deal(seed, pair.cluster)[-1], 16) % 2 == 0]
    rest = [pair for pair in dealt if int(_deal(seed, pair.cluster)[-1], 16) % 2]
    return first, rest


def static_hhh(root: Path) -> list[Pair]:
    """The 221 pairs of Static HHH."""
    pairs = []
    for sample in HHH("reward", DataSource("hub", root / "hub"), Prompting()).samples():
        answers = [(*sample.context, Message("assistant", text)) for text in sample.choices]
        pairs.append(Pair(sample.cluster, answers[sample.gold], answers[1 - sample.gold]))
    return pairs


def _deal(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()
