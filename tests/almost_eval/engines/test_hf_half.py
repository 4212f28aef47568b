"""Half precision: the structure is judged in float32, and the rounding of a run is measured and recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import REQUESTS, WHY_NOT
from torch import nn
from transformers import AutoModelForCausalLM

from almost_eval.engines.hf import HFEngine
from almost_eval.engines.hf_float32 import Head, in_float32
from almost_eval.engines.hf_loglikelihood import AttentionWindow, Limits, PlainScorer, read_logits
from almost_eval.engines.hf_probe import probe
from almost_eval.engines.hf_rounding import rounding_sample

IDS = torch.arange(3, 43)[None]

Tiny = Callable[[str], Path]


def load(tiny_checkpoint: Tiny, name: str, dtype: str = "bfloat16") -> HFEngine:
    return HFEngine(str(tiny_checkpoint(name)), dtype=dtype, device="cpu", batch_tokens=24)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", WHY_NOT)
def test_prefixes_are_shared_wherever_float32_shares_them(name: str, dtype: str, tiny_checkpoint: Tiny) -> None:
    engine = load(tiny_checkpoint, name, dtype)
    scores = dict(engine.stream(REQUESTS))
    assert len(scores) == len(REQUESTS)
    assert engine.report.path == ("plain" if WHY_NOT[name] else "shared-prefix"), engine.report.warnings
    refused = [warning for warning in engine.report.warnings if "not shared" in warning]
    assert all(str(WHY_NOT[name]) in warning for warning in refused)
    assert len(refused) == (WHY_NOT[name] is not None)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "mixtral", "opt", "bloom"])
@torch.inference_mode()
def test_a_model_computes_in_float32_for_a_while(name: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model = load(tiny_checkpoint, name).model
    before = model(IDS).logits
    # Loaded anew, as `.float()` keeps what was rounded on loading: Gemma's root of 32, which is 5.66 and not 5.65625.
    model.save_pretrained(tmp_path)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
    with in_float32(model):
        for _ in range(2):
            assert torch.allclose(model(IDS).logits, truth, rtol=0, atol=1e-5)  # other sums of the same float32 numbers
    assert torch.equal(model(IDS).logits, before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@torch.inference_mode()
def test_only_the_rows_of_an_embedding_that_are_looked_up_are_converted(tiny_checkpoint: Tiny) -> None:
    model = load(tiny_checkpoint, "gemma3").model
    table = model.model.embed_tokens
    rows: list[int] = []
    with in_float32(model):
        table.register_forward_pre_hook(lambda *_: rows.append(len(table.weight)))
        model(IDS)
    assert rows == [IDS.numel()]
    assert len(table.weight) == 300


@torch.inference_mode()
def test_a_pass_that_fails_leaves_the_model_as_it_was(tiny_checkpoint: Tiny) -> None:
    model = load(tiny_checkpoint, "llama-gqa").model
    before = model(IDS).logits
    hook = model.model.layers[1].mlp.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="half-way"), in_float32(model):
        model(IDS)
    hook.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(IDS).logits, before)


def _fail(*_: object) -> None:
    raise RuntimeError("half-way")


def test_the_probe_sees_in_half_precision_what_it_sees_in_float32(tiny_checkpoint: Tiny) -> None:
    model = load(tiny_checkpoint, "llama-gqa").model
    window = AttentionWindow.of(model.config, 60)
    assert probe(model, window, 290).sharing_is_exact
    # A small mistake, far below what bfloat16 rounds away: a query leans a little on its neighbours.
    attention = model.model.layers[-1].self_attn
    forward = attention.q_proj.forward
    attention.q_proj.forward = lambda x: forward(x) + 0.05 * x.mean((1, 2), keepdim=True)
    assert not probe(model, window, 290).sharing_is_exact


# --- the rounding of a run --------------------------------------------------------------------------------------------


def test_rounding_is_measured_on_a_sample_of_the_run(tiny_checkpoint: Tiny) -> None:
    engine = load(tiny_checkpoint, "llama-gqa")
    scores = dict(engine.stream(REQUESTS))
    rounding = engine.report.to_dict()["rounding"]
    sample = rounding_sample(REQUESTS, engine.report.tokens_computed)
    assert rounding["requests"] == len(sample) > 3
    # The definition, with a float32 copy of the model.
    truth = dict(PlainScorer(copy.deepcopy(engine.model).float()).stream(REQUESTS, sample, Limits(4096, 4096, 1)))
    off = [abs(a.logprob - b.logprob) for r in sample for a, b in zip(scores[r], truth[r], strict=True)]
    assert rounding["continuations"] == len(off)
    assert rounding["shared"]["median"] == pytest.approx(np.median(off), rel=1e-3)
    assert rounding["shared"]["largest"] == pytest.approx(max(off), rel=1e-3)
    flips = sum(np.argmax([s.logprob for s in scores[r]]) != np.argmax([s.logprob for s in truth[r]]) for r in sample)
    assert rounding["shared"]["flips"] == flips
    assert 0 < rounding["plain"]["median"] < 1


def test_a_run_that_goes_on_measures_the_same_rounding(tiny_checkpoint: Tiny) -> None:
    engine = load(tiny_checkpoint, "gemma3")
    whole = dict(engine.stream(REQUESTS))
    rounding = engine.report.rounding
    part = dict(engine.stream(REQUESTS, {2, 5}))
    assert part == {index: whole[index] for index in (2, 5)}
    assert engine.report.rounding == rounding


def test_float32_has_no_rounding_to_tell(tiny_checkpoint: Tiny) -> None:
    engine = load(tiny_checkpoint, "llama-gqa", "float32")
    list(engine.stream(REQUESTS))
    assert "rounding" not in engine.report.to_dict()


# --- the last logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "gpt-neox"])
@torch.inference_mode()
def test_the_logits_that_count_are_not_rounded(name: str, tiny_checkpoint: Tiny) -> None:
    model = load(tiny_checkpoint, name).model
    head = Head(model)
    with head:
        output = model(IDS, output_hidden_states=True, logits_to_keep=30)
    logits = output.logits[0]  # (30, vocabulary)
    weight = model.get_output_embeddings().weight
    truth = nn.functional.linear(output.hidden_states[-1][0, -30:].float(), weight.float()).log_softmax(-1)
    rows = np.arange(5, 25)
    for tokens in (np.arange(40, 60, dtype=np.int32), logits[5:25].argmax(-1).numpy().astype(np.int32)):
        wanted = truth[rows, tokens.astype(np.int64)].double().numpy()
        exact, greedy = read_logits(logits, rows, tokens, head)
        rounded, _ = read_logits(logits, rows, tokens)
        assert np.abs(exact - wanted).max() < 0.5 * np.abs(rounded - wanted).max()
        assert (exact <= 1e-6).all()
        part, _ = read_logits(output.logits[0, 5:25], np.arange(20), tokens, head)  # a view of the same logits
        assert np.array_equal(part, exact)
        assert greedy.tolist() == (truth[rows].argmax(-1).numpy() == tokens).tolist()


@torch.inference_mode()
def test_logits_that_the_model_changes_are_taken_as_they_are(tiny_checkpoint: Tiny) -> None:
    model = load(tiny_checkpoint, "gemma3").model
    model.config.get_text_config().final_logit_softcapping = 5.0
    head = Head(model)
    with head:
        logits = model(IDS).logits[0]
    rows, tokens = np.arange(10), np.arange(10, dtype=np.int32)
    assert head.exact(logits, torch.arange(10), torch.arange(10)) is None
    assert np.array_equal(read_logits(logits, rows, tokens, head)[0], read_logits(logits, rows, tokens)[0])
