"""Rows behind one copy of their header against transformers' `generate` on every row by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from almost_eval.engines import hf_decoding, hf_generation, hf_header
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.header_groups import STEP, HeaderGroup, header_groups
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.hf_decoding import Header, Rows
from almost_eval.engines.hf_header import SharedHeader
from almost_eval.engines.hf_loglikelihood import AttentionWindow

TOGETHER = ("llama-gqa", "llama-tied", "gpt2", "mistral-window", "gemma3", "qwen2", "gpt-neox", "mixtral")
HEADER = " ".join(["The cat sat on the mat, and the dog sat by the door."] * 3)
ENDS = ("hello", "numbers 1 2 3", "", "an answer that is true is a true answer, and so on", "hello", "What is that?")
Engines = Callable[..., HFEngine]


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Engines]:
    """`engines(name, **settings)`: an engine on a tiny checkpoint; its weights are loaded once per name and dtype."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    @functools.cache
    def loaded(name: str, dtype: str) -> Any:
        return HFEngine(str(tiny_checkpoint(name)), dtype=dtype, device="cpu").model

    def make(name: str, **settings: Any) -> HFEngine:
        engine = HFEngine(str(tiny_checkpoint(name)), device="cpu", **settings)
        engine.__dict__["model"] = loaded(name, settings.get("dtype", "float32"))
        return engine

    yield make
    torch.set_num_threads(threads)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every pass of rows, in turn."""
    shapes: list[tuple[int, int]] = []
    whole = Rows.forward

    def counted(rows: Rows, ids: torch.Tensor) -> torch.Tensor:
        shapes.append((ids.shape[0], ids.shape[1]))
        return whole(rows, ids)

    monkeypatch.setattr(Rows, "forward", counted)
    return shapes


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(40, temperature=0.9, top_p=0.95, n=3, seed=5, stop=("e", "th")),
        SamplingParams(40, temperature=1.3, n=2, seed=1, stop=("never said",)),
        SamplingParams(40),
    ],
    ids=["nucleus", "whole vocabulary", "greedy"],
)
def test_no_text_changes(name: str, params: SamplingParams, engines: Engines, widths: list[tuple[int, int]]) -> None:
    """Prompts of uneven lengths behind a header longer than the windows; rows that end early; several batches."""
    prompts = [f"{HEADER} {text}" for text in ENDS]
    expected = engines(name, share_prefixes=False).generate(prompts, params)
    assert not widths
    for settings in ({}, {"batch_size": 4}):
        engine = engines(name, **settings)
        assert engine.generate(prompts, params) == expected
        assert engine.report.warnings == []
        assert widths


def test_long_texts_do_not_change(engines: Engines) -> None:
    """Several hundred tokens of one row: an error in a position or a mask would grow with the distance."""
    prompts, params = [f"{HEADER} hello", f"{HEADER} and so on"], SamplingParams(150, temperature=1.5, n=2, seed=9)
    for name in ("llama-gqa", "gemma3"):
        model = engines(name).model
        before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_generation, "end_ids", lambda *_: frozenset())
            expected = engines(name, share_prefixes=False, max_length=None).generate(prompts, params)
            found = engines(name).generate(prompts, params)
        model.generation_config.eos_token_id = before
        assert sum(len(one.token_ids) for rows in expected for one in rows) == 600
        assert found == expected


def test_prompts_without_a_header_are_continued_together_too(engines: Engines, widths: list[tuple[int, int]]) -> None:
    prompts = ["The cat", "hello", "numbers 1 2 3 and what comes after them"]
    params = SamplingParams(12, temperature=1.0, n=2, seed=3)
    expected = engines("gemma3", share_prefixes=False).generate(prompts, params)
    assert engines("gemma3").generate(prompts, params) == expected
    assert widths[0][0] == len(prompts)  # the two completions of a prompt read it once
    assert widths[1] == (6, 1)


def test_a_row_that_has_ended_leaves_the_batch(engines: Engines, widths: list[tuple[int, int]]) -> None:
    prompts = [f"{HEADER} {text}" for text in ENDS]
    params = SamplingParams(40, temperature=1.2, n=2, seed=5, stop=("e",))
    completions = [one for rows in engines("llama-gqa").generate(prompts, params) for one in rows]
    steps = [rows for rows, tokens in widths if tokens == 1]
    assert len({len(one.token_ids) for one in completions}) > 3  # rows end at different times
    assert steps[0] > steps[-1]
    assert steps == sorted(steps, reverse=True)
    # An ended row stays for a step only while less than one in eight has ended.
    needed = sum(len(one.token_ids) + (one.finish_reason == "stop") for one in completions)
    assert sum(steps) <= needed * 8 / 7


def test_one_copy_of_the_header_serves_all_rows(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    whole = hf_decoding.RowCache.__init__

    def kept(cache: Any, header: Any, length: int, columns: int) -> None:
        whole(cache, header, length, columns)
        seen.update(keys.shape for keys, _ in header)
        assert columns < 60  # a row has no columns for the header
        assert length > 60

    monkeypatch.setattr(hf_decoding.RowCache, "__init__", kept)
    monkeypatch.setattr(hf_header, "_copies", lambda *_: pytest.fail("copied"))
    engine = engines("llama-gqa")
    engine.generate([f"{HEADER} {text}" for text in ENDS], SamplingParams(8))
    assert {shape[0] for shape in seen} == {1}


def test_a_model_whose_attention_is_its_own_gets_copies_and_the_report_says_so(
    engines: Engines, tiny_checkpoint: Callable[[str], Path], widths: list[tuple[int, int]]
) -> None:
    prompts, params = [f"{HEADER} {text}" for text in ENDS], SamplingParams(8, temperature=1.0, seed=2)
    engine = HFEngine(str(tiny_checkpoint("llama-gqa")), device="cpu", attention="eager")
    assert engine.generate(prompts, params) == engines("llama-gqa", share_prefixes=False).generate(prompts, params)
    assert engine.report.warnings == ["every row holds a copy of what the prompts share: attention 'eager'"]
    assert not widths
    engine.generate(["The cat", "hello"], params)  # nothing to copy
    assert engine.report.warnings == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": lambda mask: mask.clone()}, "another mask"),
        ({"key": lambda key: key * 1.0}, "other keys"),
        ({"position_bias": lambda _: torch.zeros(1)}, "a bias"),
    ],
)
def test_attention_that_is_not_understood_is_left_to_transformers(
    change: dict[str, Callable[[Any], Any]], reason: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that changes what it hands to its attention: refused at its first pass, and the texts are right."""
    from almost_eval.engines import hf_rows

    whole = hf_rows.attend

    def changed(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        named = {"key": key, "attention_mask": attention_mask, **kwargs}
        for name, alter in change.items():
            named[name] = alter(named.get(name))
        return whole(module, query, named.pop("key"), value, named.pop("attention_mask"), **named)

    prompts, params = [f"{HEADER} {text}" for text in ENDS], SamplingParams(8, temperature=1.0, seed=2)
    expected = engines("llama-gqa", share_prefixes=False).generate(prompts, params)
    monkeypatch.setattr(hf_rows, "attend", changed)
    engine = engines("llama-gqa", batch_tokens=250)  # six rows behind one copy, and two with a copy each
    sizes, apart = [], hf_generation._Writer._complete_apart

    def counted(writer: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        return apart(writer, batch)

    monkeypatch.setattr(hf_generation._Writer, "_complete_apart", counted)
    assert engine.generate(prompts, params) == expected
    assert sum(sizes) == len(prompts)
    assert max(sizes) <= 250 // 70
    [warning] = engine.report.warnings
    assert reason in warning
    assert engine.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "mistral-window"])
@pytest.mark.parametrize("scores", [1 << 24, 64])
@torch.inference_mode()
def test_the_logits_are_those_of_one_row_at_a_time(
    name: str, scores: int, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and steps, in blocks of many queries and of one, against bare passes over each whole row."""
    from almost_eval.engines import hf_rows

    monkeypatch.setattr(hf_rows, "_SCORES", scores)
    model = engines(name).model
    rng = np.random.default_rng(0)
    trunk = rng.integers(5, 100, 30, dtype=np.int32)
    prompts = [np.concatenate([trunk, rng.integers(5, 100, n, dtype=np.int32)]) for n in (1, 5, 12)]
    window = AttentionWindow.of(model.config, 200)
    layers = SharedHeader(model).layers(trunk)
    assert layers is not None
    rows, logits = hf_decoding._read(model, Header(layers, 30), prompts, 20, window)
    texts = [prompt.tolist() for prompt in prompts]
    for step in range(20):
        for text, row in zip(texts, logits, strict=True):
            alone = model(torch.tensor([text])).logits[0, -1]
            assert (row - alone).abs().max() < 1e-4
        for text in texts:
            text.append(int(rng.integers(5, 100)))
        if step == 10:  # the middle row leaves
            rows.keep(torch.tensor([0, 2]))
            texts = [texts[0], texts[2]]
        if step < 19:
            logits = rows.forward(torch.tensor([[text[-1]] for text in texts]))


def test_half_precision_is_no_further_from_float32_than_transformers(engines: Engines) -> None:
    """Logits of a bfloat16 model behind a header: attention is computed in float32, as kernels do."""
    rng = np.random.default_rng(1)
    exact, half = engines("llama-gqa").model, engines("llama-gqa", dtype="bfloat16").model
    trunk = rng.integers(5, 100, 60, dtype=np.int32)
    prompts = [np.concatenate([trunk, rng.integers(5, 100, n, dtype=np.int32)]) for n in (3, 5, 12, 20)]
    with torch.inference_mode():
        layers = SharedHeader(half).layers(trunk)
        assert layers is not None
        _, logits = hf_decoding._read(half, Header(layers, 60), prompts, 1, AttentionWindow(None, ()))
        errors = []
        for row, prompt in zip(logits, prompts, strict=True):
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            truth = exact(ids).logits[0, -1].log_softmax(-1)
            errors.append(
                [
                    float((found.float().log_softmax(-1) - truth).square().mean().sqrt())
                    for found in (row, half(ids).logits[0, -1])
                ]
            )
    together, alone = np.mean(errors, axis=0)
    assert together < 2 * alone


# --- which prompts are continued together -----------------------------------------------------------------------------


def _ids(*parts: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """`(token, times)` one after the other."""
    return np.concatenate([np.full(times, token, dtype=np.int32) for token, times in parts])


def test_prompts_behind_one_header_are_one_group() -> None:
    prompts = [_ids((1, 50), (2 + i, 3 + i)) for i in range(3)]
    assert header_groups(prompts, 8) == [HeaderGroup((2, 1, 0), 50)]


def test_a_header_that_saves_more_than_a_batch_costs_is_a_group_of_its_own() -> None:
    """Two subjects behind 10 common tokens. A second reading of a header costs `size`, a batch more STEP x 8."""
    for size, n_groups in ((STEP * 8 + 1, 2), (STEP * 8, 1)):
        prompts = [_ids((1, 10), (2 + i % 2, size), (7 + i, 2)) for i in range(4)]
        groups = header_groups(prompts, 8)
        assert len(groups) == n_groups
        assert [group.shared for group in groups] == ([10 + size] * 2 if n_groups == 2 else [10])
    assert [sorted(group.prompts) for group in header_groups(prompts, 1)] == [[0, 2], [1, 3]]


def test_what_is_left_of_the_groups_is_continued_together() -> None:
    subject = [_ids((1, 10), (2, 400), (5 + i, 2)) for i in range(3)]
    others = [_ids((1, 10), (30 + i, 4 + i)) for i in range(2)]
    groups = header_groups([others[0], *subject, others[1]], 8)
    assert sorted(groups, key=lambda group: group.shared) == [HeaderGroup((4, 0), 10), HeaderGroup((1, 2, 3), 410)]


def test_a_token_of_every_prompt_is_left_to_go_on_from() -> None:
    same = _ids((1, 20))
    assert header_groups([same, same], 8) == [HeaderGroup((0, 1), 19)]
    assert header_groups([same], 8) == [HeaderGroup((0,), 19)]
    assert header_groups([same, _ids((1, 25))], 8) == [HeaderGroup((1, 0), 19)]
    assert header_groups([_ids((1, 1)), _ids((2, 1))], 8) == [HeaderGroup((0, 1), 0)]
    assert header_groups([], 8) == []


def test_every_prompt_is_in_one_group() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 2, rng.integers(1, 60), dtype=np.int32) for _ in range(200)]
    for new_tokens in (0, 1, 3):
        groups = header_groups(prompts, new_tokens)
        assert sorted(p for group in groups for p in group.prompts) == list(range(200))
        for group in groups:
            first = prompts[group.prompts[0]]
            assert all((prompts[p][: group.shared] == first[: group.shared]).all() for p in group.prompts)
            assert all(len(prompts[p]) > group.shared for p in group.prompts)


# --- what is known early ----------------------------------------------------------------------------------------------


def test_a_completion_is_handed_over_when_it_ends(engines: Engines, widths: list[tuple[int, int]]) -> None:
    """What is killed later than that loses none of it."""
    prompts, params = [f"{HEADER} {text}" for text in ENDS], SamplingParams(40, temperature=1.2, seed=5, stop=("e",))
    passes, lengths = [], []
    for _, [completion] in engines("llama-gqa").stream_completions(prompts, params):
        passes.append(len(widths))
        lengths.append(len(completion.token_ids))
    assert lengths == sorted(lengths)
    assert passes[0] < passes[-1]


def test_only_what_is_left_is_computed_again_after_memory_ran_out(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = [f"{HEADER} {text}" for text in ENDS], SamplingParams(40, temperature=1.2, seed=5, stop=("e",))
    engine = engines("llama-gqa")
    expected, whole, batches = engine.generate(prompts, params), hf_generation._Writer.complete, []

    def short_of_memory(writer: Any, group: Any, batch: Any) -> Iterator[Any]:
        batches.append(len(batch))
        for number, item in enumerate(whole(writer, group, batch)):
            if number == 2 and len(batches) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield item

    monkeypatch.setattr(hf_generation._Writer, "complete", short_of_memory)
    found = list(engine.stream_completions(prompts, params))
    assert len(found) == len(prompts)
    assert [dict(found)[i] for i in range(len(prompts))] == expected
    assert batches[0] == 6
    assert sum(batches[1:]) == 4
    assert max(batches[1:]) < 4


# --- headers that are kept --------------------------------------------------------------------------------------------


def test_headers_are_kept_from_call_to_call(engines: Engines) -> None:
    """Two speakers in turn, as in self-play, whose dialogues grow: each header is read in the first turn alone."""
    headers_read: list[int] = []  # tokens of each pass of one row, which is a header's
    params = SamplingParams(6, temperature=1.0, seed=4)
    headers = (HEADER, HEADER.replace("The cat", "A bird"))
    kept, plain = engines("llama-gqa"), engines("llama-gqa", share_prefixes=False)

    def count(_: Any, __: Any, inputs: Any) -> None:
        rows, tokens = inputs["input_ids"].shape
        headers_read.extend([tokens] if rows == 1 else [])

    for turn in range(3):
        for header in headers:
            prompts = [f"{header} {end}{' and so on' * turn}" for end in ENDS[:3]]
            hook = kept.model.register_forward_pre_hook(count, with_kwargs=True)
            headers_read.clear()
            found = kept.generate(prompts, params)
            hook.remove()
            assert found == plain.generate(prompts, params)
            assert (sum(headers_read) > 60) == (turn == 0)
            assert sum(headers_read) < 10 or turn == 0  # a token more, where all dialogues go on alike


def test_few_headers_are_kept_and_none_twice(engines: Engines) -> None:
    header = SharedHeader(engines("llama-gqa").model)
    rng = np.random.default_rng(0)
    first, second, third = (rng.integers(5, 100, 40, dtype=np.int32) for _ in range(3))

    def kept() -> list[tuple[int, int]]:
        return [(int(one.ids[0]), len(one.ids)) for one in header._kept]

    with torch.inference_mode():
        for ids, expected in (
            (first[:30], [(first[0], 30)]),
            (first, [(first[0], 40)]),  # goes on from the 30 and takes their place
            (first[:20], [(first[0], 40)]),  # is a part of what is kept
            (second, [(first[0], 40), (second[0], 40)]),
            (first[:35], [(second[0], 40), (first[0], 40)]),
            (third, [(first[0], 40), (third[0], 40)]),
        ):
            layers = header.layers(ids)
            assert layers is not None
            assert {keys.shape[-2] for keys, _ in layers} == {len(ids)}
            assert kept() == expected
