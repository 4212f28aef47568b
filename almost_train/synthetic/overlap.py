"""ROUGE-L between a prompt and all earlier ones, by a compiled longest common subsequence.

ROUGE-L (Lin, 2004) of texts of m and n tokens is F1 = 2 LCS / (m + n). Each distinct token is written as one code
point. A prompt is then a string, and rapidfuzz's bit-parallel LCS compares it with a whole list in one call.

Departures from the official code (the `rouge` package on word pieces of `bert-base-uncased`):

- Tokens are the words and punctuation marks that BERT makes before its word pieces: no vocabulary is downloaded.
- The LCS is the plain one of the two sequences; that package counts distinct words, sentence by sentence.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

from almost_eval.errors import InputError, MissingDependencyError

_TOKEN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]|_")
_UNKNOWN = "\x00"
"""A token of a query that no earlier prompt has: it matches nothing."""


def tokens(text: str) -> list[str]:
    """Words in lower case without accents, punctuation marks and CJK characters, each a token."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return _TOKEN.findall(plain)


@dataclass(frozen=True, slots=True)
class Overlap:
    """The most similar earlier prompt."""

    text: str
    score: float
    """ROUGE-L F1, 0 to 1."""


class OverlapIndex:
    """The prompts so far.

    Args:
        threshold: F1 from which a prompt counts as a repetition; above 0, at most 1.

    Raises:
        MissingDependencyError: rapidfuzz is not installed.
    """

    def __init__(self, threshold: float) -> None:
        try:
            from rapidfuzz import process
            from rapidfuzz.distance import LCSseq
        except ImportError:
            raise MissingDependencyError("ROUGE-L needs rapidfuzz: pip install rapidfuzz") from None
        if not 0 < threshold <= 1:
            raise InputError(f"the overlap threshold is {threshold}; it must be above 0 and at most 1")
        self._extract_one, self._lcs = process.extractOne, LCSseq.similarity
        self.threshold = threshold
        self._codes: dict[str, str] = {}
        # By number of tokens: among prompts of one length the LCS alone decides, and lengths too different are skipped.
        self._encoded: dict[int, list[str]] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, text: str) -> None:
        """Every later prompt is compared with this one, too."""
        code = "".join([self._codes.setdefault(token, chr(len(self._codes) + 1)) for token in tokens(text)])
        self._encoded.setdefault(len(code), []).append(code)
        self._texts.setdefault(len(code), []).append(text)

    def nearest(self, text: str) -> Overlap | None:
        """The earlier prompt with the largest F1, where that reaches the threshold; else None."""
        query = "".join([self._codes.get(token, _UNKNOWN) for token in tokens(text)])
        known = len(query) - query.count(_UNKNOWN)
        best: Overlap | None = None
        # The nearest lengths first: they can score highest, and after a high score the others can be skipped.
        for length in sorted(self._encoded, key=lambda n: abs(n - len(query))):
            total = length + len(query)
            wanted = self._least_common(total, best.score if best else 0.0)
            if wanted > min(known, length):  # the upper bound: an LCS is no longer than either
                continue
            match = self._extract_one(query, self._encoded[length], scorer=self._lcs, score_cutoff=wanted)
            if match is not None and match[1] >= wanted:
                best = Overlap(self._texts[length][match[2]], 2 * match[1] / total)
        return best

    def _least_common(self, total: int, beaten: float) -> int:
        """The shortest LCS with F1 >= threshold and F1 > `beaten`, for m + n = `total` tokens; at least 1."""
        least = max(1, math.floor(max(self.threshold, beaten) * total / 2) - 1)
        # The same division as in the definition of F1, so that both round alike at the threshold.
        while total and (2 * least / total < self.threshold or 2 * least / total <= beaten):
            least += 1
        return least
