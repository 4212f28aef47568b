"""Archived GPT-4 reviews: our parser against the official one, review by review.

    python benchmarks/judge_parsing.py --reviews DIR --questions question.jsonl

`parsed` counts reviews with a verdict, `exact` those whose scores are the recorded ones, `wrong` those with other
scores. The official parser (restated here from its description: the first line, commas as spaces, two words that are
numbers, else -1 and -1) counts a failure as a tie and adds -1 to both totals; its totals are shown as it would.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from almost_eval.judge.questions import read_questions
from almost_eval.judge.records import Verdict
from almost_eval.judge.verdicts import parse_scores

Scores = tuple[float, float]
FAILED = (-1.0, -1.0)


def first_line_scores(review: str) -> Scores:
    """The official rule."""
    words = review.split("\n", 1)[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return FAILED
    return first, second


def our_scores(review: str, question: str) -> Scores | None:
    found = parse_scores(review, question)
    if isinstance(found, Verdict) and found.score_1 is not None and found.score_2 is not None:
        return found.score_1, found.score_2
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help="folder with review_*.jsonl, at any depth")
    parser.add_argument("--questions", type=Path, required=True)
    given = parser.parse_args()
    compare(given.reviews, given.questions)


def compare(reviews: Path, question_file: Path) -> None:
    """Print how each parser reads every review in the folder."""
    questions = {question.id: question.text for question in read_questions(question_file)}
    print("| file | parser | parsed | exact | wrong | total | recorded |\n|---|---|---|---|---|---|---|")
    counts: dict[str, list[int]] = {"official": [0, 0], "ours": [0, 0]}
    differing, n, seconds = [], 0, 0.0
    for file in sorted(reviews.glob("**/*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        recorded = [(float(row["score"][0]), float(row["score"][1])) for row in rows]
        official = [first_line_scores(row["text"]) for row in rows]
        start = time.perf_counter()
        ours = [our_scores(row["text"], questions[str(row["question_id"])]) for row in rows]
        seconds += time.perf_counter() - start
        n += len(rows)
        for name, found in (("official", [None if s == FAILED else s for s in official]), ("ours", ours)):
            parsed = sum(s is not None for s in found)
            exact = sum(s == r for s, r in zip(found, recorded, strict=True))
            counts[name][0] += parsed
            counts[name][1] += exact
            total = official if name == "official" else [s or (0.0, 0.0) for s in ours]
            sums, right = (
                " : ".join(f"{sum(pair[side] for pair in pairs):g}" for side in (0, 1)) for pairs in (total, recorded)
            )
            print(f"| {file.name} | {name} | {parsed} | {exact} | {parsed - exact} | {sums} | {right} |")
        differing += [
            f"{file.name}, question {row['question_id']}: recorded {r}, read {s}"
            for row, r, s in zip(rows, recorded, ours, strict=True)
            if r != s
        ]
    for name, (parsed, exact) in counts.items():
        print(f"\n{name}: {parsed} of {n} parsed ({parsed / n:.2%}), {exact} as recorded ({exact / n:.2%})", end="")
    print(f"\nours takes {1000 * seconds / n:.2f} ms a review; differing from the record:")
    print("\n".join(differing) or "none")


if __name__ == "__main__":
    main()
