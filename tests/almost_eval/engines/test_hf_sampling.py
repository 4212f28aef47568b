"""The nucleus and its noise against the sort of the whole row and noise for every token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from almost_eval.engines import hf_sampling
from almost_eval.engines.hf_sampling import GumbelNoise, NucleusNoise, Sampler, gumbel_of, noisiest, nuclei

VOCABULARY = 5000
Rows = Callable[[torch.Generator], torch.Tensor]


def _normal(spread: float) -> Rows:
    return lambda rng: torch.randn(6, VOCABULARY, generator=rng) * spread


def _one_hot(rng: torch.Generator) -> torch.Tensor:
    rows = torch.full((3, VOCABULARY), -80.0)
    rows[torch.arange(3), torch.randint(VOCABULARY, (3,), generator=rng)] = 20.0
    return rows


def _masked(rng: torch.Generator) -> torch.Tensor:
    rows = torch.randn(4, VOCABULARY, generator=rng)
    rows[torch.rand(4, VOCABULARY, generator=rng) < 0.99] = -torch.inf
    rows[3] = -torch.inf
    rows[3, 17] = 1.0
    return rows


def _broken(rng: torch.Generator) -> torch.Tensor:
    rows = torch.randn(4, VOCABULARY, generator=rng) * 4
    rows[0, 5] = torch.nan
    rows[1, 5] = torch.inf
    rows[2] = -torch.inf
    return rows


def _edges(rng: torch.Generator) -> torch.Tensor:
    """Probabilities whose sums meet 0.5, 0.9 and 0.99 exactly, up to rounding."""
    shares = torch.full((2, VOCABULARY), 1e-30)
    shares[0, torch.randperm(VOCABULARY, generator=rng)[:4]] = torch.tensor([0.5, 0.4, 0.09, 0.01])
    shares[1, torch.randperm(VOCABULARY, generator=rng)[:100]] = 0.01
    return shares.log()


ROWS: dict[str, Rows] = {
    "flat": _normal(0.5),
    "as a model": _normal(4.0),
    "sharp": _normal(12.0),
    "ties": lambda rng: (torch.randn(6, VOCABULARY, generator=rng) * 3).round(),
    "all alike": lambda _: torch.zeros(2, VOCABULARY),
    "one token": _one_hot,
    "masked": _masked,
    "broken": _broken,
    "edges": _edges,
    "peak and dust": lambda _: torch.cat([torch.zeros(1, 1), torch.full((1, VOCABULARY - 1), -15.0)], 1),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.99, 0.99999, 1.0])
def test_the_draws_are_those_of_the_sort(name: str, top_p: float) -> None:
    for seed in range(3):
        scores = ROWS[name](torch.Generator().manual_seed(seed))
        warped = TopPLogitsWarper(top_p)(None, scores.clone())
        kept = nuclei(scores, top_p)
        for row, ids in enumerate(kept):
            wanted = (warped[row] != -torch.inf).nonzero()[:, 0]
            assert ids.sort().values.tolist() == wanted.tolist()
        old = [np.random.default_rng((seed, row)) for row in range(len(scores))]
        new = [np.random.default_rng((seed, row)) for row in range(len(scores))]
        for _ in range(2):  # the second step begins where the first left the generators
            whole = GumbelNoise(old)(None, warped)  # type: ignore[arg-type]
            quick = NucleusNoise(top_p, new)(None, scores)  # type: ignore[arg-type]
            assert torch.equal(whole.nan_to_num(1e9), quick.nan_to_num(1e9))
            assert whole.argmax(-1).tolist() == quick.argmax(-1).tolist()


def test_most_rows_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts: list[float] = []
    whole = hf_sampling._sorted_nucleus

    def counted(scores: torch.Tensor, top_p: float) -> torch.Tensor:
        sorts.append(top_p)
        return whole(scores, top_p)

    monkeypatch.setattr(hf_sampling, "_sorted_nucleus", counted)
    scores = torch.randn(200, 50_000, generator=torch.Generator().manual_seed(0)) * 4
    nuclei(scores, 0.9)
    assert len(sorts) < 80  # flatter than a model is: the nucleus ends among tokens of one in a thousand


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_coarse_logits_are_settled_without_a_sort(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = (torch.randn(20, 50_000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16().float()
    order = scores.sort(stable=True)  # of equals the lower id is removed first
    shares = order.values.double().softmax(-1)
    stays = shares.flip(-1).cumsum(-1).flip(-1) - shares < top_p
    monkeypatch.setattr(hf_sampling, "_sorted_nucleus", lambda *_: pytest.fail("sorted"))
    for row, ids in enumerate(nuclei(scores, top_p, full_precision=False)):
        assert set(ids.tolist()) == set(order.indices[row][stays[row]].tolist())


@pytest.mark.parametrize("size", [1, 40, 4000])
def test_noise_of_a_few_is_that_of_all(size: int) -> None:
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    ids = np.random.default_rng(4).choice(50_000, size, replace=False)
    for _ in range(3):
        assert gumbel_of(one, 50_000, ids).tolist() == other.gumbel(size=50_000)[ids].tolist()
    assert one.bit_generator.state == other.bit_generator.state


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sampler_refuses_what_no_token_can_be_drawn_from(value: float, temperature: float) -> None:
    scores = torch.zeros(3, VOCABULARY)
    scores[1, 5] = value
    sampler = Sampler(temperature, 1.0, [np.random.default_rng(row) for row in range(3)], full_precision=True)
    with pytest.raises(FloatingPointError):
        sampler.draw(scores, [0, 1, 2])
    assert len(sampler.draw(scores[[0, 2]], [0, 2])) == 2


@pytest.mark.parametrize("name", [name for name in ROWS if name != "broken"])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_sampler_draws_what_transformers_processors_and_an_argmax_draw(
    name: str, top_p: float, temperature: float
) -> None:
    for seed in range(3):
        scores = ROWS[name](torch.Generator().manual_seed(seed))
        old = [np.random.default_rng((seed, row)) for row in range(len(scores))]
        new = [np.random.default_rng((seed, row)) for row in range(len(scores))]
        sampler = Sampler(temperature, top_p, new, full_precision=True)
        for rows in (list(range(len(scores))), [len(scores) - 1]):  # of the second step, one row is left
            warped = scores[rows] / temperature if temperature != 1 else scores[rows]
            warped = warped if top_p == 1 else TopPLogitsWarper(top_p)(None, warped)
            noisy = GumbelNoise([old[row] for row in rows])(None, warped)  # type: ignore[arg-type]
            assert sampler.draw(scores[rows], rows) == noisy.argmax(-1).tolist()
        assert [a.bit_generator.state for a in old] == [b.bit_generator.state for b in new]


def test_noise_is_computed_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logarithms: list[float] = []
    whole = hf_sampling._gumbel

    def counted(uniform: float) -> float:
        logarithms.append(uniform)
        return whole(uniform)

    monkeypatch.setattr(hf_sampling, "_gumbel", counted)
    rng, scores = np.random.default_rng(0), np.random.default_rng(1).normal(size=50_000).astype(np.float32) * 4
    drawn = {noisiest(rng, scores) for _ in range(100)}
    assert len(drawn) > 20
    assert len(logarithms) < 100 * 500  # of 5,000,000


def test_temperature_0_takes_the_likeliest() -> None:
    sampler = Sampler(0.0, 0.5, [], full_precision=True)
    assert sampler.draw(torch.tensor([[0.0, 3.0, 3.0], [2.0, 1.0, 0.0]]), [0, 1]) == [1, 0]
