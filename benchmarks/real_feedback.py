"""Stages 6 and 7 on real answers: comparisons of llama-2 chat 70B > 13B > 7B, a reward model, and what it is worth.

    python benchmarks/real_feedback.py --data-root ../shared/data --output runs/real-feedback

The answers are the archived ones to AlpacaEval's 805 prompts; the ranking is the method's rule of thumb, larger over
smaller. The backbone is a nano model, which has read nothing of this world: what comes out says that the stages run on
real text, and what so small a model can take from it. Printed beside the two trivial rules, on Static HHH (221 pairs)
and on human preferences (hh-rlhf, harmless-base test).
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from almost_eval.cli.command_line import import_transformers
from almost_eval.data.sources import DataSource
from almost_eval.files import write_rows
from almost_eval.models.chat import parse_dialogue
from almost_eval.progress import progress_for
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.stats import mean_metric
from almost_eval.tasks.base import Prompting
from almost_eval.tasks.hhh import HHH
from almost_eval.types import Conversation, Message
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.synthetic.comparisons import ComparisonSettings, synthesize_comparisons

MODELS = ("llama-2-70b-chat-hf", "llama-2-13b-chat-hf", "llama-2-7b-chat-hf")
"""Best first, by the rule of thumb."""

Pair = tuple[Conversation, Conversation]
"""(chosen, rejected), whole dialogues."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with hub/, alpaca_eval/ and hh_rlhf/")
    parser.add_argument("--output", type=Path, default=Path("runs/real-feedback"))
    parser.add_argument("--model", default="nano/vanilla-large", help="backbone of the reward model")
    parser.add_argument("--prompts", type=int, help="the first so many AlpacaEval prompts")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens; longer pairs are dropped and counted")
    parser.add_argument("--pairs", type=int, default=2312, help="hh-rlhf pairs to score")
    arguments = parser.parse_args()
    import_transformers()
    arguments.output.mkdir(parents=True, exist_ok=True)
    progress = progress_for()

    # 1. Real answers as the responses of three configurations, and comparisons of them by the official rules.
    responses = write_responses(arguments.data_root / "alpaca_eval", arguments.output / "responses", arguments.prompts)
    ranking = arguments.output / "ranking.yaml"
    ranking.write_text("".join(f"- {name}\n" for name in MODELS), encoding="utf-8")
    built = synthesize_comparisons(
        ComparisonSettings(pairs="all"), responses, ranking, arguments.output / "comparisons", progress=progress
    )
    print(json.dumps(built["metrics"]["filters"]))

    # 2. The reward model.
    began = time.monotonic()
    settings = RewardSettings(
        learning_rate=3e-4, weight_decay=0.01, batch_size=16, micro_batch_size=8, max_length=arguments.max_length
    )
    comparisons = arguments.output / "comparisons" / "comparisons.jsonl"
    trained = train_reward(settings, comparisons, arguments.model, arguments.output / "reward", progress=progress)
    print(json.dumps({k: v for k, v in trained["metrics"].items() if k != "eval"}))
    print(f"training: {time.monotonic() - began:.0f} s")

    # 3. What it is worth.
    scorer = HFRewardModel(str(arguments.output / "reward" / "model"))
    for name, pairs in (
        ("held-out synthetic pairs", None),
        ("Static HHH", static_hhh(arguments.data_root / "hub")),
        ("hh-rlhf harmless-base", hh_rlhf(arguments.data_root / "hh_rlhf", arguments.pairs)),
    ):
        if pairs is None:
            show(name, trained["metrics"]["eval"]["accuracy"], trained["metrics"]["eval"]["longer_wins"], 0)
        else:
            measure(name, pairs, scorer)


def write_responses(source: Path, folder: Path, limit: int | None) -> Path:
    """`responses/<model>.jsonl` of archived answers; a prompt that one of the models lacks is left out."""
    by_model = {}
    for name in MODELS:
        rows = json.loads((source / f"{name}.json").read_text(encoding="utf-8"))
        by_model[name] = {row["instruction"]: row["output"] for row in rows}
    shared = [prompt for prompt in by_model[MODELS[0]] if all(prompt in found for found in by_model.values())][:limit]
    folder.mkdir(exist_ok=True)
    for name in MODELS:
        write_rows(
            folder / f"{name}.jsonl",
            (
                {
                    "id": f"alpaca-{i:03d}",
                    "prompt": prompt,
                    "response": by_model[name][prompt].strip(),
                    "finish_reason": "stop",
                    "configuration": name,
                    "rejected": None,
                }
                for i, prompt in enumerate(shared)
            ),
        )
    print(f"{len(shared)} prompts with answers of all of {', '.join(MODELS)}")
    return folder


def static_hhh(root: Path) -> list[Pair]:
    """The 221 pairs as dialogues."""
    task = HHH("reward", DataSource("hub", root), Prompting())
    return [
        tuple((*sample.context, Message("assistant", sample.choices[i])) for i in (sample.gold, 1 - sample.gold))  # type: ignore[misc]
        for sample in task.samples()
    ]


def hh_rlhf(folder: Path, limit: int) -> list[Pair]:
    """Human preferences: the dialogues that people chose and rejected."""
    pairs: list[Pair] = []
    with gzip.open(folder / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            row: dict[str, Any] = json.loads(line)
            pairs.append((parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])))
    return pairs[:limit]


def measure(name: str, pairs: Sequence[Pair], scorer: HFRewardModel) -> None:
    """Accuracy beside "the longer wins"; pairs that do not fit the reward model are unscored, and counted."""
    lengths = [[len(ids) for ids in scorer.encode(list(pair))] for pair in pairs]
    fit = [i for i, sizes in enumerate(lengths) if max(sizes) <= scorer.context_length]
    flat = scorer.score([dialogue for i in fit for dialogue in pairs[i]])
    right = [half(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]
    longer = [half(len(pairs[i][0][-1].content), len(pairs[i][1][-1].content)) for i in fit]
    show(name, mean_metric(right).to_dict(), mean_metric(longer).to_dict(), len(pairs) - len(fit))


def half(a: float, b: float) -> float:
    """1 where a is larger, one half on a tie."""
    return 0.5 if a == b else float(a > b)


def show(name: str, accuracy: dict[str, Any], longer: dict[str, Any], unscored: int) -> None:
    """One line."""
    if accuracy["value"] is None:
        print(f"{name}: no pair could be scored, {unscored} too long")
        return
    span = "({:.3f} to {:.3f})".format(*accuracy["ci95"]) if accuracy["ci95"] else "(no interval)"
    print(
        f"{name}: {accuracy['value']:.3f} {span} on {accuracy['n']} pairs, {unscored} too long; "
        f"longer wins {longer['value']:.3f}"
    )


if __name__ == "__main__":
    main()
