"""A verdict as probabilities: what the judge's own log-probabilities say of the letters A, B and C.

The judge writes a letter and nothing else. At the token of that letter the endpoint tells the most probable tokens.
Those that are one of the letters, in whatever dress (" A", "[[A", "A]]"), are its verdict:

    P(A) : P(B) : P(C), scaled to a sum of 1, and P(model is better) = P(its letter) + P(C) / 2

This is the weighted win rate of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, `logprob_parser` and the evaluator
`weighted_alpaca_eval_gpt4_turbo`). Departures: AlpacaEval has two letters (m and M) and no tie. It reads the first
token of the completion, exactly as it is spelt; here the token is found after the thinking, in any dress. Where other
tokens than letters are as probable as all letters together, there is no verdict here (`low_mass`); AlpacaEval takes
the letters for the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from almost_eval.judge.records import TokenAlternatives, Unparsed, Verdict

TOP = 20
"""Tokens that the endpoint is to tell at each place: the most that OpenAI's takes."""
MAX_TOKENS = 16
"""Of a reply that is a letter: "[[A]]" has three to five. A judge that thinks in the text needs --max-tokens."""
MIN_MASS = 0.5
"""The letters' share of the probability, at least. Below it the judge would rather have written something else."""
LETTERS = ("A", "B", "C")
"""Assistant 1, Assistant 2, a tie."""

CLOSING = (
    "Whatever was said above of the form of your output: do not compare and do not explain. Write your verdict and "
    "nothing before or after it: [[A]] if assistant A is better, [[B]] if assistant B is better, [[C]] if they are "
    "equally good."
)
"""The end of the prompt."""

_BRACKETED = re.compile(r"\[ ?\[ ?([ABC]) ?\] ?\]")
_ALONE = re.compile(r"[\W_]*([ABC])[\W_]*")
_END = re.compile(r"<\|[^<>|]*\|>|</?s>|<eos>|<end_of_turn>|<\uff5c[^<>]*>|")
"""A token that ends a turn, or has no text."""
_DRESS = " \n\t\r[](){}<>*_\"'`.,:;|\u0120\u010a\u2581\u201c\u201d\u2018\u2019"
"""What may stand around a letter in its token; two byte-level and one SentencePiece sign for a space among it."""


def parse_probabilities(answer: str, tokens: Sequence[TokenAlternatives] | None) -> Verdict | Unparsed:
    """The verdict of a reply without its thinking, by the probabilities of its letter. `tokens` are of the reply or its
    end, thinking included; None where the endpoint told none.

    Returns:
        A verdict with `shares`, or why there is none: `no_logprobs`, `tokens_differ` (they do not make the answer),
        `no_verdict`, `ambiguous` or `low_mass`.
    """
    if tokens is None or not tells(tokens):
        return Unparsed("no_logprobs")
    spoken = list(tokens)
    while spoken and _END.fullmatch(spoken[-1][0]):
        spoken.pop()
    text, answer = "".join(token for token, _ in spoken), answer.strip()
    start = text.rfind(answer)
    if start < 0 and answer.endswith(text.strip()):  # longer than what was kept of its tokens
        start, answer = 0, text
    if start < 0:
        return Unparsed("tokens_differ")
    place = _place(text[start : start + len(answer)])
    return place if isinstance(place, Unparsed) else _verdict(_mass(_at(spoken, start + place)))


def tells(tokens: Sequence[TokenAlternatives] | None) -> bool:
    """Whether an endpoint told what other tokens it might have written, at any place."""
    return tokens is not None and any(len(alternatives) > 1 for _, alternatives in tokens)


def _place(answer: str) -> int | Unparsed:
    """Where the letter stands: in double brackets, or alone in the first line that is not empty."""
    bracketed = list(_BRACKETED.finditer(answer))
    if bracketed:
        is_one = len({match[1] for match in bracketed}) == 1
        return bracketed[0].start(1) if is_one else Unparsed("ambiguous")
    offset = 0
    for line in answer.splitlines(keepends=True):
        if line.strip():
            alone = _ALONE.fullmatch(line)
            return offset + alone.start(1) if alone else Unparsed("no_verdict")
        offset += len(line)
    return Unparsed("no_verdict")


def _at(tokens: Sequence[TokenAlternatives], place: int) -> TokenAlternatives:
    """The token that covers a character."""
    end = 0
    for token in tokens:
        end += len(token[0])
        if place < end:
            return token
    raise AssertionError("the place is in the text that the tokens make")


def _mass(token: TokenAlternatives) -> dict[str, float]:
    """Letter -> its probability at this place, over all its spellings."""
    mass = dict.fromkeys(LETTERS, 0.0)
    for spelling, logprob in token[1]:
        letter = spelling.strip(_DRESS)
        if letter in mass:
            mass[letter] += math.exp(logprob)
    return mass


def _verdict(mass: dict[str, float]) -> Verdict | Unparsed:
    whole = math.fsum(mass.values())
    if whole < MIN_MASS:
        return Unparsed("low_mass")
    first, second, tie = (mass[letter] / whole for letter in LETTERS)
    return Verdict(Verdict.of_scores(first, second).winner, shares=(first, second, tie))
