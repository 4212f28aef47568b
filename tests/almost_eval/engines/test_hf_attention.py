"""Attention in blocks of visible keys, and the rows of the last layer that nobody reads: same numbers, less work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from almost_eval.engines import hf_attention, hf_loglikelihood, hf_probe
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.hf_attention import BLOCK, ChunkPlan, LastLayer, attending, visible_attention
from almost_eval.engines.hf_loglikelihood import AttentionWindow, Limits, SharedPrefixScorer
from almost_eval.engines.hf_probe import probe
from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest, build_trie
from almost_eval.models.loading import cpu_has_bfloat16
from almost_eval.types import LoglikelihoodRequest

SHARING = ("llama-gqa", "llama-tied", "gpt2", "mistral-window", "gemma3", "qwen2", "gpt-neox", "opt", "phi3", "mixtral")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    return lambda name: HFEngine(str(tiny_checkpoint(name)), device="cpu").model


def random_requests(seed: int, longest: int = 60) -> list[EncodedRequest]:
    """A random trie: every context is cut from an earlier one and goes on by itself."""
    rng = np.random.default_rng(seed)
    pool = [rng.integers(3, 290, longest - 6, dtype=np.int32)]
    requests = []
    for _ in range(10):
        base = pool[int(rng.integers(len(pool)))]
        context = base[: int(rng.integers(1, len(base)))]
        context = np.concatenate([context, rng.integers(3, 290, int(rng.integers(0, 12)), dtype=np.int32)])
        context = context[: longest - 6]
        pool.append(context)
        tails = [rng.integers(3, 290, int(rng.integers(1, 5)), dtype=np.int32) for _ in range(2)]
        continuations = tuple(EncodedContinuation(context, tail) for tail in tails)
        requests.append(EncodedRequest(LoglikelihoodRequest("", ("", "")), continuations))
    return requests


def scores(model: Any, requests: Sequence[EncodedRequest], tokens: int, block: int) -> list[float]:
    window = AttentionWindow.of(model.config, max(request.n_positions for request in requests))
    scorer = SharedPrefixScorer(model, window, block=block)
    found = dict(scorer.stream(build_trie(requests), requests, range(len(requests)), Limits(tokens, 4096)))
    return [score.logprob for r in range(len(requests)) for score in found[r]]


def without_either(model: Any, requests: Sequence[EncodedRequest], tokens: int, patch: pytest.MonkeyPatch) -> Any:
    with patch.context() as plain:
        plain.setattr(hf_loglikelihood, "attending", lambda *_: nullcontext())
        plain.setattr(LastLayer, "of", classmethod(lambda *_: None))
        return scores(model, requests, tokens, BLOCK)


@pytest.mark.parametrize("name", SHARING)
def test_scores_are_those_of_the_models_own_attention(
    name: str, models: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(name)
    for seed, (tokens, block) in enumerate(itertools.product((16, 64, 512), (1, 5, 32, BLOCK))):
        requests = random_requests(seed)
        own = without_either(model, requests, tokens, monkeypatch)
        assert np.std(own) > 1
        np.testing.assert_allclose(scores(model, requests, tokens, block), own, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SHARING)
def test_every_layer_attends_in_blocks(
    name: str, models: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, requests = models(name), random_requests(0)
    keys: list[int] = []
    attend = hf_attention._attend

    def noted(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
        keys.append(key.shape[2])
        return attend(query, key, *rest)

    monkeypatch.setattr(hf_attention, "_attend", noted)
    scores(model, requests, 512, 16)
    n = len(build_trie(requests))
    assert len(keys) >= (model.config.num_hidden_layers - 1) * (n // 16)
    assert max(keys) < n  # in one pass there is no past: the model's own attention would have taken all n
    if name in {"mistral-window", "gemma3"}:
        assert min(keys) <= model.config.sliding_window + 16


def test_attention_takes_what_the_mask_opens() -> None:
    rng = torch.Generator().manual_seed(0)
    for heads, key_heads, size, value_size, n, past, block in [
        (4, 4, 8, 8, 9, 0, 4),
        (4, 2, 8, 8, 33, 17, 8),
        (6, 1, 8, 16, 7, 40, 3),
        (8, 2, 16, 16, 50, 5, BLOCK),
    ]:
        for scaling, gap in itertools.product((None, 0.37), (False, True)):
            query = torch.randn(1, heads, n, size, generator=rng)
            key = torch.randn(1, key_heads, past + n, size, generator=rng)
            value = torch.randn(1, key_heads, past + n, value_size, generator=rng)
            allowed = torch.rand(n, past + n, generator=rng) < 0.3
            if gap:  # columns that no query sees, in the middle
                allowed[:, past // 2 : past // 2 + 3] = False
            allowed[torch.arange(n), past + torch.arange(n)] = True
            mask = torch.zeros(1, 1, n, past + n).masked_fill(~allowed, torch.finfo(torch.float32).min)
            scale = size**-0.5 if scaling is None else scaling
            weights = query @ key.repeat_interleave(heads // key_heads, 1).transpose(2, 3) * scale
            weights = weights.masked_fill(~allowed, -torch.inf).softmax(-1)
            expected = (weights @ value.repeat_interleave(heads // key_heads, 1)).transpose(1, 2)
            layer = nn.Module()
            for rows in (None, torch.tensor([0, 2, n - 1])):
                plan = ChunkPlan({"a": allowed}, {"a": mask}, rows=rows, last=layer, block=block)
                token = hf_attention._plan.set(plan)
                try:
                    found, _ = visible_attention(layer, query, key, value, mask.view_as(mask), scaling=scaling)
                finally:
                    hf_attention._plan.reset(token)
                read = torch.arange(n) if rows is None else rows
                torch.testing.assert_close(found[:, read], expected[:, read], rtol=1e-5, atol=1e-5)
                assert found.shape == expected.shape
                assert rows is None or not found[:, 1].any()


@pytest.mark.parametrize("odd", ["mask", "position_bias", "s_aux", "dropout", "no plan"])
def test_what_is_unknown_is_left_to_transformers(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    asked: list[dict[str, Any]] = []

    def own(*_: Any, **given: Any) -> tuple[torch.Tensor, None]:
        asked.append(given)
        return torch.zeros(1), None

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", own)
    tensor = torch.randn(1, 2, 3, 4)
    allowed = torch.ones(3, 3).tril().bool()
    mask = torch.zeros(1, 1, 3, 3).masked_fill(~allowed, torch.finfo(torch.float32).min)
    extra: dict[str, Any] = {"sliding_window": 7, "scaling": 0.5, "dropout": 0.1 if odd == "dropout" else 0.0}
    if odd in {"position_bias", "s_aux"}:
        extra[odd] = torch.zeros(1, 2, 3, 3)
    plan = None if odd == "no plan" else ChunkPlan({"a": allowed}, {"a": mask})
    token = hf_attention._plan.set(plan)
    try:
        visible_attention(nn.Module(), tensor, tensor, tensor, mask.clone() if odd == "mask" else mask, **extra)
    finally:
        hf_attention._plan.reset(token)
    assert asked == [extra]  # with every argument


# --- the last layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gemma3", "qwen2"])
def test_the_last_layer_computes_the_rows_that_are_read(name: str, models: Callable[[str], Any]) -> None:
    model, requests = models(name), random_requests(3)
    trie = build_trie(requests)
    seen: dict[str, list[int]] = {}
    noted = []

    def noting(forward: Callable[[torch.Tensor], torch.Tensor], rows: list[int]) -> Any:
        def around(x: torch.Tensor) -> torch.Tensor:
            rows.append(x.shape[1])
            return forward(x)

        return around

    for place, layer in (("first", model.model.layers[0]), ("last", model.model.layers[-1])):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
            module = layer.get_submodule(part)
            # Not a hook of the module: those run in the order in which they were set.
            module.forward = noting(module.forward, seen.setdefault(f"{place} {part.split('.')[1]}", []))
            noted.append(module)
    scores(model, requests, 512, BLOCK)
    for module in noted:
        del module.forward
    n, read = len(trie), len(np.unique(trie.targets.node))
    assert 2 * read < n
    expected = {key: [n] for key in seen}
    expected |= {f"last {part}": [read] for part in ("q_proj", "o_proj", "down_proj")}
    assert seen == expected


def test_only_a_last_layer_that_is_known_is_cut(models: Callable[[str], Any]) -> None:
    assert LastLayer.of(models("gpt2")) is None
    assert LastLayer.of(models("gpt-neox")) is None
    mixture = LastLayer.of(models("mixtral"))
    assert mixture is not None
    assert [type(part) for part in mixture.position_wise] == [nn.Linear, nn.Linear]  # not the experts
    model = models("llama-gqa")
    model.model.layers[-1].self_attn.q_proj.__class__ = type("Quantised", (nn.Linear,), {})
    cut = LastLayer.of(model)
    assert cut is not None
    assert cut.position_wise == (model.model.layers[-1].self_attn.o_proj, model.model.layers[-1].mlp)
    model.config.num_hidden_layers += 1  # layers that are used more than once, or not at all
    assert LastLayer.of(model) is None


def test_the_probe_sees_a_module_that_is_not_position_wise(models: Callable[[str], Any]) -> None:
    model = models("llama-gqa")
    window = AttentionWindow.of(model.config, 60)
    assert probe(model, window, 290).sharing_is_exact
    attention = model.model.layers[-1].self_attn
    forward = attention.q_proj.forward
    attention.q_proj.forward = lambda x: forward(x) + x.mean((1, 2), keepdim=True)
    assert not probe(model, window, 290).sharing_is_exact


@pytest.mark.parametrize("size", [8, 300])
def test_the_probe_reaches_over_the_edge_of_the_window(
    size: int, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended at 256 tokens, so that the window of Gemma 3 (512) was never tried."""
    folder = str(tiny_checkpoint("gemma3"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, sliding_window=size, max_position_embeddings=512).eval()
    window = AttentionWindow.of(model.config, size + 1)
    assert window.size == size
    right = probe(model, window, 290)
    assert right.sharing_is_exact
    assert right.padding_is_exact
    for wrong in (replace(window, size=size + 1), replace(window, size=size - 1), replace(window, size=10_000)):
        with monkeypatch.context() as patch:
            patch.setattr(
                hf_probe, "SharedPrefixScorer", lambda m, _, w=wrong, **more: SharedPrefixScorer(m, w, **more)
            )
            assert not probe(model, window, 290).sharing_is_exact


# --- what is left behind ----------------------------------------------------------------------------------------------


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_as_it_was(implementation: str, models: Callable[[str], Any]) -> None:
    model, requests = models("llama-gqa"), random_requests(1)
    model.set_attn_implementation(implementation)
    during = []
    layer = model.model.layers[0]
    forward = layer.forward

    def noted(*args: Any, **given: Any) -> Any:
        during.append(model.config._attn_implementation)
        return forward(*args, **given)

    layer.forward = noted
    expected = scores(model, requests, 64, 8)
    assert set(during) == {hf_attention.NAME if implementation == "sdpa" else "eager"}
    assert (model.config._attn_implementation, hooks_of(model)) == (implementation, 0)

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("on purpose")

    last = model.model.layers[-1]
    last.forward = fails
    with pytest.raises(ValueError, match="on purpose"):
        scores(model, requests, 64, 8)
    assert (model.config._attn_implementation, hooks_of(model)) == (implementation, 0)
    assert hf_attention._plan.get() is None
    del last.forward
    assert scores(model, requests, 64, 8) == expected


def test_an_answer_that_is_waited_for_leaves_the_model_alone(models: Callable[[str], Any]) -> None:
    model, requests = models("llama-gqa"), random_requests(2)
    scorer = SharedPrefixScorer(model, AttentionWindow(None, ()))
    for _ in scorer.stream(build_trie(requests), requests, range(len(requests)), Limits(32, 4096)):
        assert (model.config._attn_implementation, hooks_of(model)) == ("sdpa", 0)


def test_memory_that_ends_inside_a_block_halves_the_batch(
    models: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, requests = models("llama-gqa"), random_requests(4)
    expected = scores(model, requests, 512, 32)
    attend = hf_attention._attend

    def small(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
        if query.shape[2] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return attend(query, key, *rest)

    monkeypatch.setattr(hf_attention, "_attend", small)
    window = AttentionWindow(None, ())
    scorer = SharedPrefixScorer(model, window, block=512)
    found = dict(scorer.stream(build_trie(requests), requests, range(len(requests)), Limits(512, 4096)))
    flat = [score.logprob for r in range(len(requests)) for score in found[r]]
    np.testing.assert_allclose(flat, expected, rtol=0, atol=2e-4)
    assert scorer.limits_used is not None
    assert scorer.limits_used.tokens < 512
    assert (model.config._attn_implementation, hooks_of(model)) == ("sdpa", 0)


def test_a_model_outside_the_registry_keeps_its_attention(models: Callable[[str], Any]) -> None:
    model = models("llama-gqa")
    plan = ChunkPlan({}, {})
    own = type("Own", (type(model),), {"_can_set_attn_implementation": classmethod(lambda _: False)})
    model.__class__ = own
    with attending(model, plan):
        assert model.config._attn_implementation == "sdpa"
        assert hf_attention._plan.get() is None


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU does not compute in bfloat16")
@pytest.mark.parametrize(("kv_heads", "groups", "size"), [(3, 3, 64), (1, 4, 256), (8, 1, 80)])
@pytest.mark.parametrize("scaling", [None, 0.11])
def test_products_in_bfloat16_lose_less_than_attention_that_rounds_its_scores(
    kv_heads: int, groups: int, size: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of one to some dozens, a first key that draws most of the weight, parts masked off."""
    monkeypatch.setattr(hf_attention, "SCORES", 40_000)  # several rounds over the heads
    generator = torch.Generator().manual_seed(0)
    q, keys = 24, 200
    query = 3 * torch.randn((1, kv_heads * groups, q, size), generator=generator)
    key, value = (torch.randn((1, kv_heads, keys, size), generator=generator) for _ in range(2))
    key[:, :, 0] *= 3
    allowed = torch.rand((q, keys), generator=generator) < 0.8
    allowed[:, 7] = True
    mask = torch.zeros((1, 1, q, keys)).masked_fill(~allowed, torch.finfo(torch.bfloat16).min)
    half = [tensor.bfloat16() for tensor in (query, key, value, mask)]
    wide = [tensor.double() for tensor in half]
    keys_of_all, values_of_all = (tensor.repeat_interleave(groups, 1) for tensor in wide[1:3])
    exact = nn.functional.scaled_dot_product_attention(
        wide[0], keys_of_all, values_of_all, attn_mask=wide[3], scale=scaling
    )
    ours = hf_attention._attend(half[0], half[1], half[2], half[3], scaling)
    monkeypatch.setattr(hf_attention, "cpu_has_bfloat16", lambda: False)
    torchs = hf_attention._attend(half[0], half[1], half[2], half[3], scaling)
    scores = half[0] @ half[1].repeat_interleave(groups, 1).mT * (scaling or size**-0.5) + half[3]
    eager = scores.float().softmax(-1).bfloat16() @ half[2].repeat_interleave(groups, 1)  # as in transformers
    off, off_in_torch, off_eager = ((part.double() - exact).abs().mean() for part in (ours, torchs, eager))
    assert ours.dtype is torch.bfloat16
    assert off < 2.5 * off_in_torch  # its scores stay in float32
    assert off < 0.5 * off_eager
