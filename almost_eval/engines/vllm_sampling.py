"""The last step of vLLM's sampler on a CPU: top-k, top-p and the draw, without sorting the vocabulary.

vLLM 0.31 (`vllm/v1/sample/ops/topk_topp_sampler.py`) sorts every row for top-p, and draws an exponential for every
token of every row: a second time, one row after the other, for requests with a seed. On a CPU and 50,000 tokens that
takes some 2.4, 0.7 and 0.7 ms a row (benchmarks/vllm_sampler.py): as much as a model of 135 M parameters. Here:

- **With a seed** the token is vLLM's own, always. The same uniform numbers are drawn from the same generator, their
  logarithms taken only for the few tokens that can win the race. The best of them that is inside the nucleus is the
  token; whether one is inside takes a sum over the likelier tokens and no sort. Where equal logits or rounding leave
  the end of the nucleus open, and the token depends on it, vLLM's own sort decides.
- **Without a seed** the distribution is vLLM's, the draws are others: a token by the inverse of the cumulative
  probability, again where it is outside the nucleus.
- **Of guessed tokens** each has the temperature, top-k and top-p of its row (`expand_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch
from numpy.typing import NDArray

_SLACK = 2.0**-18
"""How far apart sums of probabilities, vLLM's and ours, may be, with `_PER_TOKEN` for each token of the vocabulary."""
_PER_TOKEN = 2.0**-26
"""A float32 sum of V numbers is off by V/8 steps of 2^-24 at most, where eight run side by side; there are two such."""
_MARGIN = 1 + 2.0**-20
"""What a winner is ahead of the next by, at least: float32 rounds each score some times, by 2^-24 each."""
_TRIES = 8
"""Tokens of a row that are looked at before its nucleus is sorted after all."""
_CHUNK = 64
"""Tokens that the cumulative probability takes in one step."""

Vllms = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""vLLM's own sampler: logits (B, V), generators by row, k (B,), p (B,) -> tokens (B,), logits to return."""
Mask = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""vLLM's own `apply_top_k_top_p`: logits (B, V), which it may overwrite, k (B,), p (B,) -> -inf outside the nucleus."""


class Membership(Enum):
    """Whether a token is in a nucleus."""

    INSIDE = auto()
    OUTSIDE = auto()
    OPEN = auto()
    """vLLM's sort decides: equal logits, or a sum within rounding of top-p."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one step."""

    logits: torch.Tensor
    """(B, V) float32, as vLLM gave them."""
    scores: torch.Tensor
    """(B, V) float32; -inf outside the top-k."""
    weights: torch.Tensor
    """(B, V) float32, exp(scores - the largest)."""
    totals: list[float]
    """Sums of the weights; not finite where a row has a NaN, an infinity, or nothing that is possible."""
    k: torch.Tensor | None
    p: torch.Tensor | None
    top_p: list[float]
    """1 or more is no nucleus."""
    mask: Mask


class ExactSampler(torch.nn.Module):
    """Takes the place of vLLM's `TopKTopPSampler`; samples from the same distribution, with a seed the same tokens.

    Args:
        vllms: the sampler whose place it takes, which has the rows that are not for here: NaNs, and options that want
            more than tokens.
        mask: vLLM's `apply_top_k_top_p`.
    """

    def __init__(self, vllms: torch.nn.Module, mask: Mask) -> None:
        super().__init__()
        self.vllms = vllms
        self.mask = mask

    def forward(
        self,
        logits: torch.Tensor,
        generators: Mapping[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (B,) int64 after logits (B, V) float32, with the generator of each row that has a seed."""
        # Alone, top-k sorts nothing. Before top-p vLLM keeps the same tokens: those as large as the k-th.
        scores = logits if k is None else self.mask(logits.clone(), k.clone(), None)
        weights = (scores - scores.amax(-1, keepdim=True)).exp_()
        totals = weights.sum(-1).tolist()
        top_p = [1.0] * len(totals) if p is None else p.double().tolist()
        rows = _Rows(logits, scores, weights, totals, k, p, top_p, self.mask)
        tokens = torch.empty(len(totals), dtype=torch.int64)
        uniform = torch.empty(logits.shape[1], dtype=torch.float64)
        unseeded = []
        for row, total in enumerate(totals):
            generator = generators.get(row)
            if not math.isfinite(total):
                own = {0: generator} if generator is not None else {}
                tokens[row] = self.vllms(logits[row : row + 1].clone(), own, _one(k, row), _one(p, row))[0][0]
            elif generator is not None:
                tokens[row] = _race(rows, row, generator, uniform)
            else:
                unseeded.append(row)
        if unseeded:
            _draw(rows, unseeded, tokens)
        return tokens, None


def draws_are_torchs_own() -> bool:
    """Whether torch makes exponentials here as `_exponentials` does, of as many numbers from the generator.

    A build that takes them from a library of its own would not.
    """
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    wanted = torch.empty(1000).exponential_(generator=theirs)
    uniform = torch.empty(1000, dtype=torch.float64).uniform_(generator=ours)
    made = torch.from_numpy(_exponentials(uniform.numpy()))
    return torch.equal(made, wanted) and torch.equal(ours.get_state(), theirs.get_state())


def expand_rows(
    values: torch.Tensor, ends: torch.Tensor, total: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Each row's value once for each of its guessed tokens, in place of vLLM's `expand_batch_to_tokens`.

    On a CPU (0.31) that writes into an integer copy of its output, which it then forgets: temperature and top-p of
    guessed tokens are whatever was in the memory.

    Args:
        values: (B,), any dtype.
        ends: (B,) one past the last guessed token of each row.
        total: guessed tokens of all rows.
        replace_from: a value that is changed: the temperature 0 of greedy rows, by which nothing can be divided.
        replace_to: what stands in its place.

    Returns:
        (total,), of the dtype of `values`.
    """
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts, output_size=total)


def expands_rows(vllms: Callable[..., torch.Tensor]) -> bool:
    """Whether vLLM's own function does what `expand_rows` does."""
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    # Twice, on other numbers: memory that nobody writes to may hold the right ones by chance, but not both times.
    return all(
        torch.equal(vllms(values, ends, 5, 0, 1), expand_rows(values, ends, 5, 0, 1))
        for values in (torch.tensor([0.7, 0.3, 0.0]), torch.tensor([1.9, 0.0, 0.4]))
    )


def _exponentials(uniform: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N,) -> (N,), to the last bit what `exponential_` makes of the same uniform numbers."""
    # `math.log1p` is C's, as in torch's loop over one generator; that of numpy or torch for arrays may round apart.
    return np.array([-math.log1p(-u) for u in uniform.tolist()]).astype(np.float32)


def _one(values: torch.Tensor | None, row: int) -> torch.Tensor | None:
    return None if values is None else values[row : row + 1].clone()


def membership(
    scores: NDArray[np.float32], weights: NDArray[np.float32], total: float, token: int, top_p: float
) -> Membership:
    """Whether top-p keeps a token of a row of scores (V,), whose weights (V,) are exp(scores - the largest).

    vLLM adds probabilities up from the least, in float32, and drops tokens while the sum is at most 1 - p. So a token
    stays where those that are likelier have less than p together.
    """
    if top_p >= 1:
        return Membership.INSIDE  # what vLLM drops then has probability 0
    ids = np.flatnonzero(scores >= scores[token])
    likelier_ids = ids[scores[ids] > scores[token]]
    alike = len(ids) - len(likelier_ids) - 1
    likelier = float(weights[likelier_ids].sum(dtype=np.float64)) / total
    slack = _SLACK + _PER_TOKEN * len(scores)
    if likelier >= top_p + slack:
        return Membership.OUTSIDE
    if len(ids) == 1:
        return Membership.INSIDE  # the likeliest always stays
    # Of equal logits vLLM's sort, which is not stable, puts any first.
    last = likelier + alike * float(weights[token]) / total
    return Membership.INSIDE if last < top_p - slack else Membership.OPEN


def _kept(rows: _Rows, row: int) -> torch.Tensor:
    """The probabilities (V,) of a row, by vLLM's own sort: 0 outside the nucleus."""
    masked = rows.mask(rows.logits[row : row + 1].clone(), _one(rows.k, row), _one(rows.p, row))
    return masked.softmax(-1, dtype=torch.float32)[0]


def _race(rows: _Rows, row: int, generator: torch.Generator, uniform: torch.Tensor) -> int:
    """The token with the largest weight over exponential, among those in the nucleus; `uniform` (V,) is overwritten."""
    u = uniform.uniform_(generator=generator).numpy()
    scores, weights = rows.scores[row].numpy(), rows.weights[row].numpy()
    # The exponential of u is u at least. So a token reaches the score of the likeliest, which top-p always keeps,
    # only where u is at most its weight over that score. The weight of the likeliest is 1.
    reach = float(_exponentials(u[scores.argmax(), None])[0]) * _MARGIN
    ids = np.flatnonzero(u <= weights * np.float32(reach))
    race = weights[ids] / _exponentials(u[ids])
    ahead = np.argsort(-race)
    points = [*race[ahead].tolist(), 0.0]
    for place, token in enumerate(ids[ahead[:_TRIES]].tolist()):
        outcome = membership(scores, weights, rows.totals[row], token, rows.top_p[row])
        if outcome is Membership.INSIDE and points[place] > points[place + 1] * _MARGIN:
            return int(token)
        if outcome is not Membership.OUTSIDE:
            break
    kept = _kept(rows, row).numpy()
    ids = np.flatnonzero(kept)
    return int(ids[(kept[ids] / _exponentials(u[ids])).argmax()])


def _draw(rows: _Rows, which: list[int], tokens: torch.Tensor) -> None:
    """Fill in the tokens of the rows without a seed, which share torch's global generator."""
    scores, weights = rows.scores.numpy(), rows.weights.numpy()
    left = which
    by_weight = _Inverse(rows.weights if len(which) == len(rows.totals) else rows.weights[which], which)
    for _ in range(_TRIES):
        still = []
        for row, token in by_weight.draw(left):
            outcome = membership(scores[row], weights[row], rows.totals[row], token, rows.top_p[row])
            # The same token is kept or drawn again by what vLLM's sort says: another draw would favour others.
            if outcome is Membership.INSIDE or (outcome is Membership.OPEN and float(_kept(rows, row)[token]) > 0):
                tokens[row] = token
            else:
                still.append(row)
        left = still
        if not left:
            return
    for row in left:  # all draws were outside; the next one is taken from inside
        ((_, token),) = _Inverse(_kept(rows, row)[None], [row]).draw([row])
        tokens[row] = token


class _Inverse:
    """Draws tokens in proportion to weights (R, V), by two sums: over chunks, and within the chunk that is hit."""

    def __init__(self, weights: torch.Tensor, rows: list[int]) -> None:
        self._place = {row: at for at, row in enumerate(rows)}
        short = -weights.shape[1] % _CHUNK
        self._chunks = torch.nn.functional.pad(weights, (0, short)).reshape(len(rows), -1, _CHUNK)
        self._sums = self._chunks.sum(-1).double()  # (R, chunks)
        self._ends = self._sums.cumsum(-1)

    def draw(self, rows: list[int]) -> Iterator[tuple[int, int]]:
        """A (row, token) for each of `rows`."""
        at = torch.tensor([self._place[row] for row in rows])
        ends = self._ends[at]
        aim = torch.rand(len(rows), 1, dtype=torch.float64) * ends[:, -1:]
        chunk = torch.searchsorted(ends, aim, right=True).clamp_(max=ends.shape[1] - 1)
        inner = self._chunks[at, chunk[:, 0]].double()  # (R, _CHUNK)
        aim -= ends.gather(1, chunk) - self._sums[at].gather(1, chunk)
        # Where rounding puts the aim beyond the last token that has a weight, it is that one's.
        sums = inner.cumsum(-1)
        last = torch.where(inner > 0, torch.arange(_CHUNK), 0).amax(-1, keepdim=True)
        place = torch.minimum(torch.searchsorted(sums, aim, right=True), last)
        yield from zip(rows, (chunk * _CHUNK + place)[:, 0].tolist(), strict=True)
