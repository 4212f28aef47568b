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
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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

    number: int
    """How many were added before it."""
    score: float
    """ROUGE-L F1, 0 to 1."""


class OverlapIndex:
    """The prompts so far, by their tokens and not by their texts: one meets only those that can reach the threshold.

    An LCS is no longer than what two prompts have in common as bags of tokens, and F1 >= threshold needs an LCS of a
    certain length. So a prompt that has too few tokens in common with the new one is left out before any LCS, and no
    decision changes. The tokens in common are counted in an inverted index: token -> prompts that have it. The
    longest lists ("the", "?") are not walked: each can add one at most, which is conceded to every prompt. (Chaudhuri
    et al. 2006, prefix filter; Li, Lu and Lu 2008, "DivideSkip".)

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
        self._bands: dict[int, _Band] = {}
        self._least: dict[int, int] = {}
        # Among prompts of one length the LCS alone decides. A length's place says when it was first seen.
        self._places: dict[int, int] = {}
        self._added = 0

    def add(self, text: str) -> None:
        """Every later prompt is compared with this one, too."""
        code = "".join([self._codes.setdefault(token, chr(len(self._codes) + 1)) for token in tokens(text)])
        self._places.setdefault(len(code), len(self._places))
        # Prompts of similar length are in one index: the shortest of it says how many lists need not be walked.
        self._bands.setdefault(len(code).bit_length(), _Band()).add(self._added, code)
        self._added += 1

    def nearest(self, text: str) -> Overlap | None:
        """The earlier prompt with the largest F1, where that reaches the threshold; else None."""
        query = "".join([self._codes.get(token, _UNKNOWN) for token in tokens(text)])
        known = len(query) - query.count(_UNKNOWN)
        best: Overlap | None = None
        by_length = self._candidates(query, known)
        # The nearest lengths first: they can score highest, and after a high score the others can be skipped.
        for length in sorted(by_length, key=lambda n: (abs(n - len(query)), self._places[n])):
            total = length + len(query)
            wanted = self._least_common(total, best.score if best else 0.0)
            if wanted > min(known, length):  # the upper bound: an LCS is no longer than either
                continue
            band, places = by_length[length]
            codes = [band.codes[place] for place in places]
            match = self._extract_one(query, codes, scorer=self._lcs, score_cutoff=wanted)
            if match is not None and match[1] >= wanted:
                best = Overlap(band.numbers[places[match[2]]], 2 * match[1] / total)
        return best

    def _candidates(self, query: str, known: int) -> dict[int, tuple[_Band, list[int]]]:
        """Length -> its band, and the places there of the prompts that have enough tokens in common with a query."""
        elements = list(_elements(query))
        by_length: dict[int, tuple[_Band, list[int]]] = {}
        for band in self._bands.values():
            # Lengths too different are skipped: wanted > min(m, n).
            wanted = {n: self._least_of(n + len(query)) for n in band.present}
            wanted = {n: least for n, least in wanted.items() if least <= min(known, n)}
            for place in band.sharing(elements, wanted) if wanted else ():
                by_length.setdefault(len(band.codes[place]), (band, []))[1].append(place)
        return by_length

    def _least_of(self, total: int) -> int:
        """The shortest LCS that reaches the threshold; computed once for each total."""
        if total not in self._least:
            self._least[total] = self._least_common(total, 0.0)
        return self._least[total]

    def _least_common(self, total: int, beaten: float) -> int:
        """The shortest LCS with F1 >= threshold and F1 > `beaten`, for m + n = `total` tokens; at least 1."""
        least = max(1, math.floor(max(self.threshold, beaten) * total / 2) - 1)
        # The same division as in the definition of F1, so that both round alike at the threshold.
        while total and (2 * least / total < self.threshold or 2 * least / total <= beaten):
            least += 1
        return least


def _elements(code: str) -> Iterator[tuple[str, int]]:
    """Each token with how often it came before: what two texts share of these is what they share as bags of tokens."""
    before: dict[str, int] = {}
    for token in code:
        if token != _UNKNOWN:
            before[token] = count = before.get(token, -1) + 1
            yield token, count


class _Band:
    """The inverted index of some prompts."""

    def __init__(self) -> None:
        self.numbers = array("i")
        """How many prompts of all bands were added before each."""
        self.codes: list[str] = []
        self.present: set[int] = set()
        """Lengths of these prompts, in tokens."""
        self._lengths = array("i")
        self._lists: dict[tuple[str, int], array[int]] = {}
        """Element -> places of the prompts that have it, each once, ascending."""

    def add(self, number: int, code: str) -> None:
        place = len(self.codes)
        self.numbers.append(number)
        self.codes.append(code)
        self.present.add(len(code))
        self._lengths.append(len(code))
        for element in _elements(code):
            self._lists.setdefault(element, array("i")).append(place)

    def sharing(self, elements: Sequence[tuple[str, int]], wanted: Mapping[int, int]) -> list[int]:
        """Places, ascending, of the prompts that may share as many elements as are wanted of their length."""
        # 1. Count, over the shorter lists. A prompt must be in one of them, so the rest is fewer than the least wanted.
        lists = sorted((self._lists[one] for one in elements if one in self._lists), key=len)
        arrays = [np.frombuffer(places, np.intc) for places in lists]
        walked = len(arrays) - min(min(wanted.values()) - 1, len(arrays))
        counts = np.zeros(len(self.codes), np.int32)
        for shorter in arrays[:walked]:
            counts[shorter] += 1  # no place twice in one list
        # 2. Those that have enough if they are in all other lists.
        least = np.full(max(self.present) + 1, np.iinfo(np.int32).max)  # by length
        for length, count in wanted.items():
            least[length] = count
        places = np.flatnonzero(counts)
        missing = least[np.frombuffer(self._lengths, np.intc)[places]] - counts[places]
        for number, longer in enumerate(arrays[walked:]):
            may = missing <= len(arrays) - walked - number
            places, missing = places[may], missing[may]
            # 3. Whether they are, by bisection.
            missing -= longer[np.minimum(np.searchsorted(longer, places), len(longer) - 1)] == places
        return [int(place) for place in places[missing <= 0]]
