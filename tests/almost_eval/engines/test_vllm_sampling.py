"""The last step of vLLM's sampler against vLLM's own: the same tokens with a seed, the same distribution without."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from almost_eval.engines import vllm_process, vllm_sampling
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.vllm import VLLMEngine
from almost_eval.engines.vllm_sampling import (
    ExactSampler,
    Membership,
    draws_are_torchs_own,
    expand_rows,
    expands_rows,
    membership,
)

VOCABULARY = 5000
ROWS = 12
Generators = dict[int, torch.Generator]


def sorted_mask(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Top-k, then top-p, as vLLM 0.31 applies them on a CPU."""
    values, ids = logits.sort(dim=-1, descending=False)
    if k is not None:
        values = values.masked_fill(values < values.gather(1, (logits.shape[1] - k.long())[:, None]), -torch.inf)
    if p is not None:
        outside = values.softmax(-1).cumsum(-1) <= 1 - p[:, None]
        outside[:, -1] = False
        values = values.masked_fill(outside, -torch.inf)
    return logits.scatter(-1, ids, values)


class Vllms(torch.nn.Module):
    """Sorts every row, and draws an exponential for every token, as vLLM 0.31 does on a CPU."""

    def forward(
        self, logits: torch.Tensor, generators: Mapping[int, torch.Generator], k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        probabilities = sorted_mask(logits, k, p).softmax(-1)
        noise = torch.empty_like(probabilities).exponential_()
        for row, generator in generators.items():
            noise[row].exponential_(generator=generator)
        return probabilities.div(noise).argmax(-1), None


def generators(rows: int = ROWS) -> Generators:
    return {row: torch.Generator().manual_seed(row) for row in range(rows)}


def sampler() -> ExactSampler:
    return ExactSampler(Vllms(), sorted_mask)


def same_tokens(draw: Callable[[], torch.Tensor], steps: int, k: object = None, p: object = None) -> None:
    """Both samplers, each with generators of its own, over some steps."""
    ours, theirs = generators(), generators()
    sizes = None if k is None else torch.as_tensor(k, dtype=torch.int32).expand(ROWS).clone()
    shares = None if p is None else torch.as_tensor(p, dtype=torch.float32).expand(ROWS).clone()
    for _ in range(steps):
        logits = draw()
        before = logits.clone()
        mine = sampler()(logits, ours, sizes, shares)[0]
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())
        assert torch.equal(mine, Vllms()(logits, theirs, sizes, shares)[0])
    assert all(torch.equal(ours[row].get_state(), theirs[row].get_state()) for row in ours)


@pytest.fixture
def sorts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were sorted after all."""
    rows: list[int] = []
    whole = vllm_sampling._kept

    def counted(step: Any, row: int) -> torch.Tensor:
        rows.append(row)
        return whole(step, row)

    monkeypatch.setattr(vllm_sampling, "_kept", counted)
    return rows


def test_torch_makes_exponentials_of_the_same_numbers() -> None:
    assert draws_are_torchs_own()


@pytest.mark.parametrize("p", [None, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.5, 4.0, 12.0])
def test_a_seed_gives_vllms_own_tokens(p: float | None, spread: float, sorts: list[int]) -> None:
    rng = torch.Generator().manual_seed(1)
    same_tokens(lambda: torch.randn(ROWS, VOCABULARY, generator=rng) * spread, 12, p=p)
    assert len(sorts) <= 12  # of 144


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_a_seed_gives_vllms_own_tokens_where_logits_are_coarse(p: float, sorts: list[int]) -> None:
    """In bfloat16 the nucleus mostly ends among equal logits, of which an unstable sort keeps some."""
    rng = torch.Generator().manual_seed(2)
    same_tokens(lambda: (torch.randn(ROWS, VOCABULARY, generator=rng) * 12).round() / 4 / 0.7, 40, p=p)
    assert 0 < len(sorts) < 48  # of 480: the token was in doubt, and seldom


@pytest.mark.parametrize(("k", "p"), [(1, None), (20, None), (20, 0.9), (VOCABULARY, 0.9), (3, 1e-6)])
def test_top_k_and_a_seed(k: int, p: float | None) -> None:
    rng = torch.Generator().manual_seed(3)
    same_tokens(lambda: (torch.randn(ROWS, VOCABULARY, generator=rng) * 4).bfloat16().float(), 6, k=k, p=p)


def test_each_row_has_its_own_top_k_and_top_p() -> None:
    rng = torch.Generator().manual_seed(4)
    k = [VOCABULARY if row % 3 else 7 for row in range(ROWS)]
    p = [(0.2, 0.9, 1.0, 0.95)[row % 4] for row in range(ROWS)]
    same_tokens(lambda: torch.randn(ROWS, VOCABULARY, generator=rng) * 4, 10, k=k, p=p)


def edges() -> torch.Tensor:
    """Probabilities whose sums meet 0.5 and 0.9 exactly, up to rounding; all alike; masked; nothing, NaN, infinity."""
    rows = torch.full((ROWS, VOCABULARY), 1e-30)
    rows[0, 17:21] = torch.tensor([0.5, 0.4, 0.09, 0.01])
    rows[1, ::50] = 0.01
    rows = rows.log()
    rows[2] = 0.0
    rows[3], rows[3, 40:45] = -torch.inf, torch.tensor([1.0, 2.0, 2.0, 3.0, 3.0])
    rows[4], rows[4, 9] = -torch.inf, 2.0
    rows[5] = -torch.inf
    rows[6, 5] = torch.nan
    rows[7, 5] = torch.inf
    return rows


@pytest.mark.parametrize("p", [None, 0.5, 0.9, 1e-6])
def test_rows_at_an_edge(p: float | None) -> None:
    same_tokens(edges, 8, p=p)


def test_the_verdict_on_a_token() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.1, 0.1], dtype=np.float32))
    weights = scores - scores.max()
    weights = np.exp(weights)
    total = float(weights.sum())
    verdicts = [
        [membership(scores, weights, total, token, p) for token in range(4)] for p in (0.4, 0.7, 0.85, 0.95, 1.0)
    ]
    inside, outside, undecided = Membership.INSIDE, Membership.OUTSIDE, Membership.OPEN
    assert verdicts == [
        [inside, outside, outside, outside],  # the likeliest alone, which always stays
        [inside, inside, outside, outside],  # 0.5 before the second, 0.8 before the others
        [inside, inside, undecided, undecided],  # 0.8 < 0.85, and 0.9 not: one of two equals stays
        [inside, inside, inside, inside],  # 0.9 < 0.95
        [inside, inside, inside, inside],
    ]
    # The end of the nucleus is where rounding may put it on either side.
    assert membership(scores, weights, total, 1, 0.5) is Membership.OPEN


def fits(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square of the draws: none where there is no probability, and less than five deviations too much elsewhere."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    wanted = probabilities[possible].double() * len(tokens)
    excess = float(((counts[possible] - wanted) ** 2 / wanted).sum())
    free = int(possible.sum()) - 1
    assert excess < free + 5 * math.sqrt(2 * free) + 5


@pytest.mark.parametrize(("k", "p"), [(None, None), (None, 0.9), (None, 0.3), (40, None), (40, 0.8), (None, 0.02)])
def test_without_a_seed_the_distribution_is_vllms_own(k: int | None, p: float | None) -> None:
    rng = torch.Generator().manual_seed(5)
    row = (torch.randn(1, 300, generator=rng) * 1.5).bfloat16().float()  # equal logits; 300 is no multiple of a chunk
    many = 6000
    sizes = None if k is None else torch.full((many,), k, dtype=torch.int32)
    shares = None if p is None else torch.full((many,), p)
    torch.manual_seed(6)
    tokens = sampler()(row.expand(many, -1).contiguous(), {}, sizes, shares)[0]
    one = (None if sizes is None else sizes[:1], None if shares is None else shares[:1])
    fits(tokens, sorted_mask(row, *one).softmax(-1)[0])


def test_rows_with_and_without_a_seed_share_a_step() -> None:
    rng = torch.Generator().manual_seed(7)
    logits, p = torch.randn(ROWS, VOCABULARY, generator=rng) * 4, torch.full((ROWS,), 0.9)
    seeded = {row: generator for row, generator in generators().items() if row % 2}
    theirs = Vllms()(logits, generators(), None, p)[0]
    mine = sampler()(logits, seeded, None, p)[0]
    assert torch.equal(mine[1::2], theirs[1::2])
    inside = sorted_mask(logits, None, p) > -torch.inf
    assert bool(inside[torch.arange(ROWS), mine].all())


# --- with vLLM ---


@pytest.mark.slow
def test_against_vllms_own_sampler() -> None:
    """What the tests above call vLLM's own, is; on rows of a real size."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

    vllms, rows = TopKTopPSampler(), 8
    mine, ours, theirs, third = ExactSampler(vllms, apply_top_k_top_p), *(generators(rows) for _ in range(3))
    rng = torch.Generator().manual_seed(8)
    p, k = torch.full((rows,), 0.9), torch.full((rows,), 50, dtype=torch.int32)
    for step in range(24):
        logits = (torch.randn(rows, 49_152, generator=rng) * (2 + step % 5)).bfloat16().float() / 0.8
        for sizes in (None, k):
            wanted = vllms(logits.clone(), theirs, None if sizes is None else sizes.clone(), p)[0]
            assert torch.equal(mine(logits, ours, sizes, p)[0], wanted)
            assert torch.equal(Vllms()(logits, third, sizes, p)[0], wanted)


@pytest.mark.slow
def test_the_engine_draws_the_same_with_vllms_own_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    made = []
    params = SamplingParams(max_new_tokens=16, temperature=1.5, top_p=0.95, n=6, seed=3)
    for worker in (vllm_process.CPU_WORKER, "auto"):
        monkeypatch.setattr(vllm_process, "CPU_WORKER", worker)
        engine = VLLMEngine("nano/almost", dtype="float32", max_length=128)
        made.append(engine.generate(["Human: What does the otter eat?\n\nAssistant:", "Human: Hi"], params))
        part = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.sampler.topk_topp_sampler
        assert isinstance(part, ExactSampler) == (worker != "auto")
        engine.close()
    assert made[0] == made[1]
    assert len({completion.token_ids for answers in made[0] for completion in answers}) > 2


def test_each_guessed_token_has_the_temperature_of_its_row() -> None:
    """On a CPU vLLM 0.31 leaves what was in the memory there; by hand: rows of 2, 0 and 3 guessed tokens."""
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    of_rows = torch.tensor([0.7, 0.3, 0.0])
    assert expand_rows(of_rows, ends, 5, 0, 1).tolist() == pytest.approx([0.7, 0.7, 1, 1, 1])
    assert expand_rows(torch.tensor([5, 0, 7]), ends, 5).tolist() == [5, 5, 7, 7, 7]
    assert expands_rows(expand_rows)
    assert not expands_rows(lambda values, *rest: torch.full((5,), 0.7))
