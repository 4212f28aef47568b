"""Draws the next token of every row: a nucleus without sorting the vocabulary, and Gumbel noise for those it keeps.

A nucleus is some dozens of tokens out of 50,000 or 250,000, so the largest 64 are looked at, then 512, then 4,096,
until they hold the mass that is wanted. The draw is the one that comes of sorting the whole row and of noise for every
token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, TopPLogitsWarper

WIDTHS = (64, 512, 4096)
"""How many of the largest logits are looked at, in turn."""
_LOGARITHMS = 16
"""Noise for a token alone costs about as much as numpy takes for this many."""


class TokenDraw(Protocol):
    """Draws the next tokens of rows."""

    def draw(self, logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        """A token after each of the logits (B, V), which belong to these rows; rows that have ended are left out."""
        ...


class Sampler:
    """Draws the next tokens of rows, each row from a generator of its own; temperature 0 takes the likeliest.

    The draws are those of `TemperatureLogitsWarper`, `TopPLogitsWarper` and `GumbelNoise` followed by an argmax.

    Args:
        temperature: what logits are divided by.
        top_p: mass of the nucleus.
        generators: one for each row.
        full_precision: see `NucleusNoise`.
    """

    def __init__(
        self, temperature: float, top_p: float, generators: Sequence[np.random.Generator], *, full_precision: bool
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generators = generators
        self._full_precision = full_precision

    def draw(self, logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        """A token after each of the logits (B, V), which belong to these rows.

        Raises:
            FloatingPointError: NaN among the logits, or infinity: an argmax would take a token all the same.
        """
        scores = logits.float()
        likeliest = refuse_not_finite(scores)
        if self._temperature == 0:
            return [int(token) for token in likeliest.tolist()]
        if self._temperature != 1:
            scores = scores / self._temperature
        generators = [self._generators[row] for row in rows]
        if self._top_p >= 1:
            return [noisiest(g, row) for g, row in zip(generators, scores.cpu().numpy(), strict=True)]
        vocabulary = scores.shape[-1]
        tokens = []
        kept = nuclei(scores, self._top_p, full_precision=self._full_precision)
        for row, (nucleus, generator) in enumerate(zip(kept, generators, strict=True)):
            nucleus = nucleus.sort().values  # of equals, an argmax over all takes the lowest id
            ids = nucleus.cpu().numpy()
            noise = gumbel_of(generator, vocabulary, ids).astype(np.float32)
            noisy = scores[row, nucleus].cpu().numpy() + noise
            tokens.append(int(ids[noisy.argmax()]) if len(ids) else 0)  # none where all logits are -inf
        return tokens


def refuse_not_finite(scores: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row (B,) of `scores` (B, V).

    Raises:
        FloatingPointError: a row has NaN or plus infinity. Minus infinity is what a mask writes.
    """
    likeliest = scores.argmax(-1, keepdim=True)  # that of a NaN, where there is one
    if not bool((scores.gather(-1, likeliest) < torch.inf).all()):  # false for a NaN too
        raise FloatingPointError("the logits are not finite")
    return likeliest[:, 0]


class FiniteLogits(LogitsProcessor):
    """Refuses logits that are not finite, see `refuse_not_finite`; leaves all others as they are."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) as they are."""
        refuse_not_finite(scores)
        return scores


class GumbelNoise(LogitsProcessor):
    """Adds to row i noise from generator i, so that the argmax is a sample."""

    def __init__(self, generators: Sequence[np.random.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V), the noise of each row drawn on the CPU: the same draws on every device."""
        noise = np.stack([g.gumbel(size=scores.shape[-1]) for g in self._generators])
        return scores.float() + torch.from_numpy(noise).float().to(scores.device)  # type: ignore[return-value]


class NucleusNoise(LogitsProcessor):
    """`TopPLogitsWarper` and then `GumbelNoise`: the same scores, and each generator moves as far.

    Args:
        top_p: mass of the nucleus, below 1.
        generators: one for each row.
        full_precision: the logits were computed in float32. Those of half precision are coarse, so that the nucleus
            often ends among tokens that are alike: then those of the highest ids stay, where the sort leaves it open.
    """

    def __init__(self, top_p: float, generators: Sequence[np.random.Generator], *, full_precision: bool = True) -> None:
        self._top_p = top_p
        self._generators = generators
        self._full_precision = full_precision

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(B, V): -inf outside the nucleus, the noisy score inside."""
        scores = scores.float()  # type: ignore[assignment]
        vocabulary = scores.shape[-1]
        noisy = torch.full_like(scores, -torch.inf)
        kept = nuclei(scores, self._top_p, full_precision=self._full_precision)
        for row, (ids, generator) in enumerate(zip(kept, self._generators, strict=True)):
            noise = gumbel_of(generator, vocabulary, ids.cpu().numpy())
            noisy[row, ids] = scores[row, ids] + torch.from_numpy(noise).float().to(scores.device)
        return noisy  # type: ignore[return-value]


def nuclei(scores: torch.Tensor, top_p: float, *, full_precision: bool = True) -> list[torch.Tensor]:
    """The ids that `TopPLogitsWarper` keeps of each row of `scores` (B, V), in float32.

    It adds up probabilities in float32, in the order of the whole row. Where the end of the nucleus is within the error
    of such a sum, or between equal logits, the row is sorted after all.
    """
    rows, vocabulary = scores.shape
    largest = scores.amax(-1, keepdim=True)
    total = (scores - largest).exp().sum(-1, keepdim=True, dtype=torch.float64)
    kept: list[torch.Tensor | None] = [None] * rows
    open_rows = list(range(rows))
    for width in WIDTHS:
        if not open_rows or 4 * width > vocabulary:
            break
        values, ids = scores[open_rows].topk(width)  # descending
        mass = (values - largest[open_rows]).exp().double() / total[open_rows]
        before = mass.cumsum(-1) - mass  # of the tokens that are likelier
        # The sort adds probabilities up from the least, in eight sums or more side by side, each step off by 2^-24 of
        # the sum so far: together 2^-27 of the mean rank. What is not looked at has the last rank. Then single
        # roundings.
        ranks = torch.arange(1, width + 1, dtype=torch.float64, device=scores.device)
        mean_rank = (mass * ranks).sum(-1, keepdim=True) + (1 - mass.sum(-1, keepdim=True)).clamp(min=0) * vocabulary
        slack = mean_rank * 2**-27 + 2**-19 if full_precision else torch.zeros_like(mean_rank)
        inside, outside = before < top_p - slack, before >= top_p + slack
        inside[:, 0] = True  # the likeliest always stays
        outside[:, 0] = False
        sizes, ends = inside.sum(-1).tolist(), outside[:, -1].tolist()
        undecided = (~inside & ~outside).any(-1).tolist()
        still_open = []
        for at, row in enumerate(open_rows):
            size = sizes[at]
            if not ends[at]:
                still_open.append(row)
            elif not undecided[at] and bool(values[at, size - 1] > values[at, size]):
                kept[row] = ids[at, :size]
            elif not full_precision:
                kept[row] = _highest_ids(scores[row], values[at], size)
            else:
                kept[row] = _sorted_nucleus(scores[row], top_p)
        open_rows = still_open
    return [_sorted_nucleus(scores[row], top_p) if ids is None else ids for row, ids in enumerate(kept)]


def _highest_ids(scores: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` largest of a row; of those that equal the least of them, the highest ids."""
    least = values[size - 1]
    sure, alike = (scores > least).nonzero()[:, 0], (scores == least).nonzero()[:, 0]
    return torch.cat([sure, alike[len(alike) - (size - len(sure)) :]])


def _sorted_nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    warped = TopPLogitsWarper(top_p)(None, scores[None])[0]
    return (warped != -torch.inf).nonzero()[:, 0]


def gumbel_of(generator: np.random.Generator, vocabulary: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """`generator.gumbel(size=vocabulary)[ids]`, to the last bit, without the logarithms of the others."""
    if len(ids) * _LOGARITHMS > vocabulary:
        return generator.gumbel(size=vocabulary)[ids]
    state = generator.bit_generator.state
    uniform = generator.random(vocabulary)
    if not uniform.all():  # numpy draws again for a zero, which moves all draws after it
        generator.bit_generator.state = state
        return generator.gumbel(size=vocabulary)[ids]
    return np.array([_gumbel(u) for u in uniform[ids].tolist()])


def noisiest(generator: np.random.Generator, scores: NDArray[np.float32]) -> int:
    """The argmax of `scores` (V,) with the noise of `GumbelNoise`, which is computed for the few that may win.

    The noise of u is at most -log(u) (as -log(1 - u) >= u), so a token can reach the noisy score s of another only
    where u <= exp(score - s).
    """
    state = generator.bit_generator.state
    uniform = generator.random(len(scores))
    likeliest = int(scores.argmax())
    bar = float(scores[likeliest]) + _gumbel(uniform[likeliest]) if uniform.all() else np.nan
    if not np.isfinite(bar):
        generator.bit_generator.state = state
        return int((scores + generator.gumbel(size=len(scores)).astype(np.float32)).argmax())
    with np.errstate(over="ignore"):
        # A thousandth for what float32 rounds; logits beyond some thousands would ask for more.
        reach = np.exp(scores - np.float32(bar - 1e-3 - abs(bar) * 2**-20))
    ids = np.flatnonzero(uniform <= reach)
    noise = np.array([_gumbel(u) for u in uniform[ids].tolist()]).astype(np.float32)
    return int(ids[(scores[ids] + noise).argmax()])


def _gumbel(uniform: float) -> float:
    # `math.log` and not `np.log`: the same function of C as in numpy's own loop, whose vectorised one may round apart.
    return -math.log(-math.log(1.0 - uniform))
