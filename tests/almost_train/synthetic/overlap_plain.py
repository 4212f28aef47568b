"""The plain path of the ROUGE-L filter, and prompts to try both on: for tests and for `benchmarks/sizes.py`."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from almost_train.synthetic.overlap import Overlap, tokens

PROMPTS = Path(__file__).parents[3] / "almost_train" / "prompts"
VOCABULARY = 60_000
"""Made-up words, drawn by Zipf's law: the k-th has a weight of 1 / k."""


class Exhaustive:
    """Each prompt is compared with every earlier one; of equal scores the nearest length wins, then the first."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._codes: dict[str, str] = {}
        self._encoded: dict[int, list[str]] = {}
        self._numbers: dict[int, list[int]] = {}
        self._added = 0

    def _encode(self, text: str) -> str:
        return "".join(self._codes.setdefault(token, chr(len(self._codes) + 1)) for token in tokens(text))

    def add(self, text: str) -> None:
        code = self._encode(text)
        self._encoded.setdefault(len(code), []).append(code)
        self._numbers.setdefault(len(code), []).append(self._added)
        self._added += 1

    def nearest(self, text: str) -> Overlap | None:
        query = self._encode(text)
        best: Overlap | None = None
        for length in sorted(self._encoded, key=lambda n: abs(n - len(query))):
            row = process.cdist([query], self._encoded[length], scorer=LCSseq.similarity)[0]
            if len(row) and length + len(query):
                score = 2 * int(row.max()) / (length + len(query))
                if score >= self.threshold and (best is None or score > best.score):
                    best = Overlap(self._numbers[length][int(row.argmax())], score)
        return best


def prompts(count: int, seed: int = 0) -> Iterator[str]:
    """Prompts that a model might mine: the shipped seeds' turns of phrase, their rarer words replaced by made-up ones.

    Two seeds lend a half each, so the common words ("how do I", "the", "?") come in real order and share; one prompt in
    ten is an earlier one with a few words replaced.
    """
    rng = random.Random(seed)
    lines = (PROMPTS / "seed_prompts.txt").read_text(encoding="utf-8").splitlines()[1:]
    seeds = [line.split() for line in lines if line.strip()]
    uses = Counter(word for line in seeds for word in line)
    rare = [word for word, n in uses.items() if n < 4]
    weights = list(itertools.accumulate(1 / k for k in range(1, VOCABULARY + 1)))
    words = ["".join(rng.choices("bcdfglmnprstv", k=3) + rng.choices("aeiou", k=2)) + str(k) for k in range(VOCABULARY)]
    is_rare = set(rare)
    recent: list[str] = []
    for _ in range(count):
        if recent and rng.random() < 0.1:
            line = rng.choice(recent).split()
            for at in rng.sample(range(len(line)), min(len(line), rng.randint(0, 5))):
                [line[at]] = rng.choices(words, cum_weights=weights)
        else:
            one, other = rng.choice(seeds), rng.choice(seeds)
            line = one[: max(2, len(one) // 2)] + other[len(other) // 2 :]
            drawn = iter(rng.choices(words, cum_weights=weights, k=len(line)))
            line = [next(drawn) if word in is_rare else word for word in line]
        text = " ".join(line)
        if len(recent) < 1000:
            recent.append(text)
        else:
            recent[rng.randrange(1000)] = text
        yield text
