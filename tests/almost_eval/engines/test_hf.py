"""Shared-prefix and batched scores against one row at a time, on a dozen architectures; then generation."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from forking import REQUESTS, WHY_NOT
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from almost_eval.engines import hf_generation
from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, RequestScores, SamplingParams
from almost_eval.engines.decoding import decode
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.hf_generation import GenerationReport, stream_completions
from almost_eval.engines.hf_loglikelihood import Limits, PlainScorer, SharedPrefixScorer
from almost_eval.engines.prefix import EncodedContinuation, EncodedRequest, build_trie
from almost_eval.errors import InputError, RunError
from almost_eval.types import LoglikelihoodRequest

Engines = Callable[..., HFEngine]


@torch.inference_mode()
def one_row_at_a_time(model: Any, requests: Sequence[EncodedRequest]) -> list[list[tuple[float, bool]]]:
    """The definition: log softmax of a bare forward pass."""
    answers = []
    for request in requests:
        scores = []
        for continuation in request.continuations:
            ids = torch.from_numpy(np.concatenate([continuation.prefix, continuation.scored]).astype(np.int64))
            logprob = model(ids[None, :-1]).logits[0].float().log_softmax(-1)[-len(continuation.scored) :]
            target = ids[-len(continuation.scored) :]
            picked = logprob.gather(1, target[:, None]).double().sum().item()
            scores.append((picked, bool((logprob.argmax(-1) == target).all())))
        answers.append(scores)
    return answers


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Engines]:
    """`engines(name, **settings)`: an engine on a tiny checkpoint; its weights are loaded once per name and dtype."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on models this small a second thread only waits, and where cores are shared for long

    @functools.cache
    def loaded(name: str, dtype: str) -> Any:
        return HFEngine(str(tiny_checkpoint(name)), dtype=dtype, device="cpu").model

    def make(name: str, **settings: Any) -> HFEngine:
        engine = HFEngine(str(tiny_checkpoint(name)), device="cpu", **settings)
        engine.__dict__["model"] = loaded(name, settings.get("dtype", "float32"))
        return engine

    yield make
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def truth(engines: Engines) -> Callable[[str], list[list[tuple[float, bool]]]]:
    return functools.cache(lambda name: one_row_at_a_time(engines(name).model, REQUESTS))


def run(engine: HFEngine, wanted: set[int] | None = None) -> dict[int, RequestScores]:
    return dict(engine.stream(REQUESTS, wanted))


def assert_equal(found: dict[int, RequestScores], truth: list[list[tuple[float, bool]]], tolerance: float) -> None:
    assert found.keys() == set(range(len(truth)))
    for index, scores in found.items():
        for score, (logprob, greedy), continuation in zip(
            scores, truth[index], REQUESTS[index].continuations, strict=True
        ):
            assert score.n_tokens == len(continuation.scored)
            assert abs(score.logprob - logprob) <= tolerance * score.n_tokens
            assert score.is_greedy == greedy


# --- log-likelihoods --------------------------------------------------------------------------------------------------


def test_the_requests_are_worth_the_name() -> None:
    trie = build_trie(REQUESTS)
    assert trie.tokens_plain > 4 * len(trie)
    assert max(request.n_positions for request in REQUESTS) > 40  # past every window
    assert len(set(trie.depth[1:][np.diff(trie.depth) < 1].tolist())) > 10  # depths at which a branch begins


@pytest.mark.parametrize("name", WHY_NOT)
@pytest.mark.parametrize("share", [True, False])
def test_scores_are_those_of_one_row_at_a_time(
    name: str, share: bool, engines: Engines, truth: Callable[[str], Any]
) -> None:
    spread = [logprob for scores in truth(name) for logprob, _ in scores]
    assert np.std(spread) > 1, "the checkpoint tells its tokens apart too little for a mix-up to show"
    batches = [(1, 512), (8, 7), (None, 7), (None, 512)]
    if share and WHY_NOT[name]:
        batches = batches[-1:]  # the plain path is on trial with share=False
    for batch_size, batch_tokens in batches:
        engine = engines(name, share_prefixes=share, batch_size=batch_size, batch_tokens=batch_tokens)
        assert_equal(run(engine), truth(name), 1e-4)
        report, why_not = engine.report, WHY_NOT[name]
        refused = [warning for warning in report.warnings if "not shared" in warning]
        if share and why_not is None:
            assert (report.path, report.warnings) == ("shared-prefix", [])
            assert report.to_dict()["computed_over_trie"] == 1.0
            assert report.to_dict()["plain_over_computed"] > 4
        else:
            assert report.path == "plain"
            assert report.tokens_computed <= report.tokens_plain
            assert len(refused) == share
            assert not share or str(why_not) in refused[0]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        *((name, True) for name in ("llama-gqa", "mistral-window", "gemma3", "mixtral")),
        *((name, False) for name in ("llama-gqa", "mixtral", "mamba")),
    ],
)
def test_a_part_of_the_requests_scores_the_same_bits(name: str, share: bool, engines: Engines) -> None:
    for batch_tokens in (7, 24) if share else (64,):
        engine = engines(name, share_prefixes=share, batch_tokens=batch_tokens)
        whole = run(engine)
        for seed in range(10):
            rng = np.random.default_rng(seed)
            wanted = set(rng.choice(len(REQUESTS), int(rng.integers(0, 6)), replace=False).tolist())
            assert run(engine, wanted) == {index: whole[index] for index in wanted}  # ==, to the last bit


def test_what_nobody_needs_is_not_computed(engines: Engines) -> None:
    engine = engines("llama-gqa", batch_tokens=7)
    run(engine)
    with counted(engine.model) as every:
        run(engine)
    with counted(engine.model) as passes:
        run(engine, {0})
    assert 0 < len(passes) < len(every)


class counted:
    """The shapes of the logits of every forward pass: `with counted(model) as shapes`."""

    def __init__(self, model: Any) -> None:
        self._head = model.get_output_embeddings()
        self.shapes: list[tuple[int, ...]] = []

    def __enter__(self) -> list[tuple[int, ...]]:
        self._hook = self._head.register_forward_hook(lambda _m, _i, out: self.shapes.append(tuple(out.shape)))
        return self.shapes

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@pytest.mark.parametrize("name", [name for name, why_not in WHY_NOT.items() if why_not is None])
def test_logits_are_read_at_scored_positions_only(name: str, engines: Engines) -> None:
    engine = engines(name, batch_tokens=32)
    run(engine)  # the probe is done
    with counted(engine.model) as shapes:
        run(engine)
    rows = [batch * positions for batch, positions, _ in shapes]
    scored = len(np.unique(build_trie(REQUESTS).targets.node))
    assert sum(rows) <= scored + sum(n == 1 for n in rows)  # a pass without a scored position reads one row
    assert sum(rows) < len(build_trie(REQUESTS))
    scorer = SharedPrefixScorer(engine.model, _window(engine))
    trie = build_trie(REQUESTS)
    with counted(engine.model) as shapes:
        list(scorer.stream(trie, REQUESTS, range(len(REQUESTS)), Limits(64, 3)))
    assert max(batch * positions for batch, positions, _ in shapes) == 3


def _window(engine: HFEngine) -> Any:
    from almost_eval.engines.hf_loglikelihood import AttentionWindow

    return AttentionWindow.of(engine.model.config, max(request.n_positions for request in REQUESTS))


def test_the_plain_path_reads_no_more_than_the_longest_continuation(engines: Engines) -> None:
    engine = engines("llama-gqa", share_prefixes=False, batch_size=8)
    run(engine)
    with counted(engine.model) as shapes:
        run(engine)
    assert max(positions for _, positions, _ in shapes) <= 7
    assert max(batch for batch, _, _ in shapes) == 8


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "opt", "gemma3"])
def test_padding_with_a_real_token_changes_nothing(name: str, engines: Engines, truth: Callable[[str], Any]) -> None:
    model = engines(name).model
    for pad_id in (0, 123):
        scorer = PlainScorer(model, pad_id=pad_id)
        assert_equal(dict(scorer.stream(REQUESTS, range(len(REQUESTS)), Limits(4096, 4096))), truth(name), 1e-4)


def test_text_goes_in_and_scores_come_out_in_order(engines: Engines) -> None:
    engine = engines("llama-gqa")
    assert isinstance(engine, LoglikelihoodEngine)
    assert isinstance(engine, GenerationEngine)
    requests = [
        LoglikelihoodRequest("The capital of France is", (" Paris", " the cat", " Paris")),
        LoglikelihoodRequest("", ("hello",)),
        LoglikelihoodRequest("The capital of France is", (" a dog by the door",)),
    ]
    scores = engine.loglikelihood(requests)
    assert [len(row) for row in scores] == [3, 1, 1]
    assert scores[0][0] == scores[0][2]
    assert engine.loglikelihood([]) == []
    context, whole = (engine.tokenizer(text)["input_ids"] for text in ("The capital of France is",) * 2)
    whole = engine.tokenizer("The capital of France is Paris")["input_ids"]
    with torch.inference_mode():
        logprob = engine.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(logprob[i - 1, whole[i]].item() for i in range(len(context), len(whole)))
    assert scores[0][0].logprob == pytest.approx(expected, abs=1e-4)


def test_bfloat16(engines: Engines) -> None:
    """Held against the same weights in float32, as two roundings tell nothing of each other."""
    means = {}
    for share in (True, False):
        engine = engines("llama-gqa", dtype="bfloat16", share_prefixes=share)
        scores = run(engine)
        assert engine.report.path == ("shared-prefix" if share else "plain")
        exact = one_row_at_a_time(copy.deepcopy(engine.model).float(), REQUESTS)
        off = [abs(a.logprob - b) / a.n_tokens for i in scores for a, (b, _) in zip(scores[i], exact[i], strict=True)]
        assert max(off) < 0.15
        means[share] = fmean(off)
    assert means[True] <= 1.5 * means[False]  # weights at random are harsh: real models have 1.0 to 1.1


def test_a_request_that_does_not_fit_is_refused_before_weights(tiny_checkpoint: Callable[[str], Path]) -> None:
    engine = HFEngine(str(tiny_checkpoint("llama-gqa")), max_length=20)
    with pytest.raises(InputError, match="does not fit the context of 20"):
        run(engine)
    assert "model" not in engine.__dict__
    fits = EncodedContinuation(np.arange(19, dtype=np.int32), np.arange(2, dtype=np.int32))  # the last id is no input
    assert len(dict(engine.stream([EncodedRequest(LoglikelihoodRequest("", ("",)), (fits,))]))) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float23"},
        {"attention": "flash"},
        {"batch_size": 0},
        {"batch_tokens": -1},
        {"max_length": 0},
        {"max_length": 10**6},
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError):
        HFEngine(str(tiny_checkpoint("llama-gqa")), **settings)


def test_a_model_that_gives_no_numbers_says_so(tiny_checkpoint: Callable[[str], Path]) -> None:
    engine = HFEngine(str(tiny_checkpoint("llama-gqa")), device="cpu")
    engine.model.lm_head.weight.data[7] = math.nan
    found = run(engine)
    assert all(math.isnan(score.logprob) for scores in found.values() for score in scores)
    assert engine.report.path == "plain"  # nothing shows that sharing is exact
    assert engine.report.warnings


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_memory(engines: Engines) -> Iterator[Callable[[HFEngine, int], None]]:
    """`limit(engine, tokens)`: its model fails, half-way through its layers, on more tokens than that."""
    changed = []

    def limit(engine: HFEngine, tokens: int) -> None:
        last = engine.model.model.layers[-1]
        forward = last.forward

        def guarded(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden.shape[0] * hidden.shape[1] > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
            return forward(hidden, *args, **kwargs)

        last.forward = guarded
        changed.append(last)

    yield limit
    for layer in changed:
        del layer.forward


@pytest.mark.parametrize("wanted", [None, {13}])
def test_the_shared_path_halves_its_batches_when_memory_ends(
    wanted: set[int] | None,
    engines: Engines,
    small_memory: Callable[[HFEngine, int], None],
    truth: Callable[[str], Any],
) -> None:
    engine = engines("llama-gqa", batch_tokens=64, batch_size=8)
    expected = truth("llama-gqa")  # which the limited model could not compute
    run(engine)
    small_memory(engine, 16)
    found = run(engine, wanted)
    for index in wanted or range(len(REQUESTS)):
        for score, (logprob, greedy) in zip(found[index], expected[index], strict=True):
            assert score.logprob == pytest.approx(logprob, abs=1e-4 * score.n_tokens)
            assert score.is_greedy == greedy
    assert any("out of memory: went on with 16 tokens" in warning for warning in engine.report.warnings)


def test_a_first_batch_that_fails_leaves_no_layer_behind(
    engines: Engines, small_memory: Callable[[HFEngine, int], None]
) -> None:
    engine = engines("llama-gqa", batch_tokens=64)
    rows = [np.arange(first, first + 20, dtype=np.int32) for first in (3, 100)]  # two roots: nothing is shared
    requests = [
        EncodedRequest(LoglikelihoodRequest("", ("",)), (EncodedContinuation(row[:17], row[17:]),)) for row in rows
    ]
    whole = dict(engine.stream(requests))
    small_memory(engine, 16)  # one batch, then batches of 16, the first of which nobody wants
    [(index, [score])] = engine.stream(requests, {1})
    assert index == 1
    assert score.logprob == pytest.approx(whole[1][0].logprob, abs=1e-4)


def test_the_plain_path_halves_its_batches_when_memory_ends(
    engines: Engines, small_memory: Callable[[HFEngine, int], None], truth: Callable[[str], Any]
) -> None:
    engine = engines("llama-gqa", share_prefixes=False)
    run(engine)
    small_memory(engine, 64)
    assert_equal(run(engine), truth("llama-gqa"), 1e-4)
    assert any("out of memory" in warning for warning in engine.report.warnings)


@pytest.mark.parametrize("share", [True, False])
def test_no_memory_at_all_is_one_line(
    share: bool, engines: Engines, small_memory: Callable[[HFEngine, int], None]
) -> None:
    engine = engines("llama-gqa", share_prefixes=share)
    run(engine)
    small_memory(engine, 1)
    with pytest.raises(RunError, match="out of memory") as failed:
        run(engine)
    assert "\n" not in str(failed.value)


# --- generation -------------------------------------------------------------------------------------------------------

PROMPTS = ["The cat", "Human: what is the capital of France?\n\nAssistant:", "hello", "numbers 1 2 3", ""]


def test_greedy_is_that_of_transformers(engines: Engines) -> None:
    engine = engines("llama-gqa")
    found = engine.generate(PROMPTS, SamplingParams(max_new_tokens=12))
    for prompt, [completion] in zip(PROMPTS, found, strict=True):
        ids = engine.tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=2
        )
        expected = [int(i) for i in alone[0, ids.shape[1] :] if i not in (1, 2)]
        assert list(completion.token_ids) == expected
        assert completion.text == engine.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mistral-window", "mamba"])
def test_a_draw_does_not_depend_on_its_neighbours(name: str, engines: Engines) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=0.7, top_p=0.95, n=3, seed=5)
    together = engines(name, batch_size=8).generate(PROMPTS, params)
    assert engines(name, batch_size=1).generate(PROMPTS, params) == together
    assert engines(name, batch_size=8).generate(PROMPTS[::-1], params) == together[::-1]
    assert engines(name).generate(PROMPTS[2:3], params) == together[2:3]
    for completions in together:
        assert len({completion.token_ids for completion in completions}) > 1
    other_seed = SamplingParams(max_new_tokens=8, temperature=0.7, top_p=0.95, n=3, seed=6)
    assert engines(name).generate(PROMPTS, other_seed) != together


_HEADER = " ".join(["The cat sat on the mat, and the dog sat by the door."] * 3)


@pytest.mark.parametrize(
    ("name", "is_shared"),
    [
        ("llama-gqa", True),
        ("llama-tied", True),
        ("gpt2", True),
        ("mistral-window", True),
        ("gemma3", True),
        ("qwen2", True),
        ("gpt-neox", True),
        ("mixtral", True),
        ("bloom", False),
        ("phi3-longrope", False),
        ("mamba", False),
    ],
)
def test_a_header_read_once_changes_no_text(name: str, is_shared: bool, engines: Engines) -> None:
    """Prompts of uneven lengths behind a header, in several batches, against every row read by itself."""
    prompts = [f"{_HEADER} {text}" for text in (*PROMPTS, "hello", "an answer that is true is a true answer")]
    params = SamplingParams(max_new_tokens=8, temperature=0.7, top_p=0.95, n=2, seed=5)
    plain = engines(name, share_prefixes=False).generate(prompts, params)
    for settings in ({}, {"batch_size": 3}, {"batch_size": 1}):
        engine = engines(name, **settings)
        assert engine.generate(prompts, params) == plain
        assert engine.generate(prompts[::-1], params) == plain[::-1]
        assert is_shared != any("not shared" in warning for warning in engine.report.warnings)


def test_a_header_is_computed_once(engines: Engines) -> None:
    positions: list[int] = []
    prompts = [f"{_HEADER} {text}" for text in PROMPTS]

    def count(_: Any, __: Any, inputs: Any) -> None:
        positions.append(inputs["input_ids"].numel())

    for share in (False, True):
        engine = engines("llama-gqa", share_prefixes=share, batch_size=2)
        hook = engine.model.register_forward_pre_hook(count, with_kwargs=True)
        engine.generate(prompts, SamplingParams(max_new_tokens=1))
        hook.remove()
        if not share:
            plain = sum(positions)
            positions.clear()
    assert sum(positions) < plain / 2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.6)])
def test_frequencies_are_those_of_the_softmax(bpe_tokenizer: Any, temperature: float, top_p: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    prompt, n = np.array([0, 5, 7], dtype=np.int32), 2000
    params = SamplingParams(max_new_tokens=1, temperature=temperature, top_p=top_p, n=n)
    [(_, completions)] = stream_completions(model, bpe_tokenizer, [prompt], params, GenerationReport(4096))
    drawn = [c.token_ids[0] if c.token_ids else 1 for c in completions]  # the end token is not in `token_ids`
    with torch.inference_mode():
        p = (model(torch.tensor([[0, 5, 7]])).logits[0, -1] / temperature).softmax(-1).double().numpy()
    order = np.argsort(-p)
    kept = order[np.cumsum(p[order]) - p[order] < top_p]  # the fewest of the most likely that reach top_p
    assert 1 < len(kept) <= 12
    assert (len(kept) < 12) == (top_p < 1)
    expected = np.zeros(12)
    expected[kept] = p[kept] / p[kept].sum()
    found = np.bincount(drawn, minlength=12) / n
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()


def _greedy(engine: HFEngine, prompt: str, **settings: Any) -> Any:
    return engine.generate([prompt], SamplingParams(**{"max_new_tokens": 20, **settings}))[0][0]


def test_a_stop_string_cuts_the_text(engines: Engines) -> None:
    engine = engines("llama-gqa")
    free = {prompt: _greedy(engine, prompt) for prompt in PROMPTS}
    stop = free["hello"].text[6:8]
    params = SamplingParams(max_new_tokens=20, stop=("never said", stop))
    for prompt, [cut] in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        at = free[prompt].text.find(stop)
        if at < 0:  # its neighbours end earlier; it does not notice
            assert cut == free[prompt]
            continue
        assert cut.finish_reason == "stop"
        assert cut.text == free[prompt].text[:at]
        assert cut.token_ids == free[prompt].token_ids[: len(cut.token_ids)]
        spelled = engine.tokenizer.decode(cut.token_ids)
        assert stop in spelled
        assert stop not in engine.tokenizer.decode(cut.token_ids[:-1])
    assert free["hello"].finish_reason == "length"
    assert len(free["hello"].token_ids) == 20


class CountingTokenizer:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, **options: Any) -> str:
        self.decoded += len(ids)
        return str(self._tokenizer.decode(ids, **options))

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return [self.decode(ids, **options) for ids in rows]


def test_the_decoded_tokens_grow_with_the_completion_and_not_with_its_square(engines: Engines) -> None:
    engine = engines("llama-gqa")
    counts = []
    for n in (50, 100, 200):
        tokenizer: Any = CountingTokenizer(engine.tokenizer)
        params = SamplingParams(max_new_tokens=n, temperature=1.0, stop=("never said",), seed=2)
        prompt = np.array([0, 5], dtype=np.int32)
        with pytest.MonkeyPatch.context() as patch:  # a special token's probability is not 0
            patch.setattr(hf_generation, "end_ids", lambda *_: frozenset())
            [(_, [completion])] = stream_completions(engine.model, tokenizer, [prompt], params, GenerationReport(4096))
        assert len(completion.token_ids) == n
        counts.append(tokenizer.decoded)
    assert counts[2] < 50 * 200  # 20,000 where each step decodes the whole completion
    assert counts[2] - counts[1] <= 1.1 * 2 * (counts[1] - counts[0])  # 100 more cost twice as much as 50 more


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_a_row_ends_at_the_token_at_which_its_whole_text_holds_a_stop_string(
    name: str, bpe_tokenizer: Any, sentencepiece_tokenizer: Any
) -> None:
    """The tails that are decoded against the whole, token by token, on random tokens and on text with wide letters."""
    tokenizer = sentencepiece_tokenizer(False) if name == "sentencepiece" else bpe_tokenizer
    rng = np.random.default_rng(7)
    ended, prompt = 0, [5, 6, 7]
    spoken = tokenizer.encode(
        "The owl \U0001f989\u00e9\n\n\nHuman: \u7b54\u3048 is  that way", add_special_tokens=False
    )
    for _ in range(60):
        noise = rng.integers(0, len(tokenizer), size=60).tolist()
        at = int(rng.integers(0, 60))
        ids = [*noise[:at], *spoken, *noise[at:]] if rng.random() < 0.7 else noise
        text = tokenizer.decode(ids, skip_special_tokens=True)
        begin = int(rng.integers(0, len(text) - 6))
        stops: tuple[str, ...] = (
            text[begin : begin + int(rng.integers(1, 6))],
            "\n\nHuman:",
            "\U0001f989\u00e9",
            "\u7b54\u3048 is",
        )
        stops = stops[int(rng.integers(0, 2)) :]
        expected = next(
            (
                n
                for n in range(1, len(ids) + 1)
                if any(s in tokenizer.decode(ids[:n], skip_special_tokens=True) for s in stops)
            ),
            None,
        )
        criterion = hf_generation.StopStrings(tokenizer, stops, len(prompt))
        for n in range(1, len(ids) + 1):
            rows = torch.tensor([[*prompt, *ids[:n]]])
            assert criterion(rows, rows).tolist() == [expected is not None and n >= expected]
        assert criterion.length.get(0) == expected
        ended += expected is not None
    assert ended > 30


def test_a_stop_string_that_the_prompt_begins_does_not_count(engines: Engines) -> None:
    engine = engines("llama-gqa")
    free = _greedy(engine, "hello")
    across = "hello"[-2:] + free.text[:1]
    assert across not in free.text
    assert _greedy(engine, "hello", stop=(across,)) == free


def test_end_tokens_end(engines: Engines) -> None:
    engine = engines("llama-gqa")
    free = _greedy(engine, "hello")
    third = free.token_ids[3]
    before = free.token_ids[: free.token_ids.index(third)]
    special = engine.model.generation_config
    for ends in (third, [1, third]):
        special.eos_token_id = ends
        try:
            ended = _greedy(engine, "hello")
        finally:
            special.eos_token_id = 1
        assert (ended.token_ids, ended.finish_reason) == (before, "stop")
        assert ended.text == engine.tokenizer.decode(before)


def test_a_special_token_can_be_a_stop_string(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines("llama-gqa")
    free = _greedy(engine, "hello")
    monkeypatch.setattr(type(engine.tokenizer), "all_special_tokens", ["<|im_end|>"])
    monkeypatch.setattr(type(engine.tokenizer), "convert_tokens_to_ids", lambda _self, _text: free.token_ids[2])
    cut = _greedy(engine, "hello", stop=("<|im_end|>",))
    assert cut.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2])]
    assert cut.finish_reason == "stop"


def test_settings_that_a_checkpoint_ships_do_not_act_unseen(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, engines: Engines
) -> None:
    import json
    import shutil

    folder = shutil.copytree(tiny_checkpoint("llama-gqa"), tmp_path / "habits")
    shipped = {"eos_token_id": 1, "repetition_penalty": 5.0, "num_beams": 3, "do_sample": True, "temperature": 9.0}
    (folder / "generation_config.json").write_text(json.dumps(shipped))
    params = SamplingParams(max_new_tokens=12)
    assert HFEngine(str(folder), device="cpu").generate(PROMPTS, params) == engines("llama-gqa").generate(
        PROMPTS, params
    )


def test_a_prompt_that_leaves_no_room_is_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    engine = HFEngine(str(tiny_checkpoint("llama-gqa")), max_length=16)
    with pytest.raises(InputError, match="do not fit the context of 16"):
        engine.generate(["hello " * 8], SamplingParams(max_new_tokens=12))
    assert "model" not in engine.__dict__
    assert engine.generate([], SamplingParams()) == []


def test_each_prompt_comes_when_its_last_completion_is_known(engines: Engines) -> None:
    engine, params = engines("llama-gqa", batch_size=3), SamplingParams(max_new_tokens=4, temperature=1.0, n=2)
    stream = engine.stream_completions(PROMPTS, params)
    first, completions = next(stream)
    assert len(completions) == 2
    rest = dict(stream)
    assert [{first: completions, **rest}[i] for i in range(len(PROMPTS))] == engine.generate(PROMPTS, params)


def test_generation_goes_on_with_half_the_batch_when_memory_runs_out(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, params = engines("llama-gqa"), SamplingParams(max_new_tokens=4, temperature=1.0, n=2)
    expected, whole, sizes = engine.generate(PROMPTS, params), hf_generation._Writer.complete, []

    def short_of_memory(writer: Any, group: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from whole(writer, group, batch)

    monkeypatch.setattr(hf_generation._Writer, "complete", short_of_memory)
    assert engine.generate(PROMPTS, params) == expected
    assert max(sizes) > 3
    assert any("out of memory" in warning for warning in engine.report.warnings)

    monkeypatch.setattr(
        hf_generation._Writer, "complete", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(RunError, match="out of memory with one prompt"):
        engine.generate(PROMPTS, params)


@pytest.mark.parametrize("name", ["llama-gqa", "sentencepiece"])
def test_a_completion_keeps_the_space_it_begins_with(
    name: str, bpe_tokenizer: Any, sentencepiece_tokenizer: Any
) -> None:
    tokenizer = sentencepiece_tokenizer(False) if name == "sentencepiece" else bpe_tokenizer
    prompt = tokenizer.encode("the answer is")
    ids = tokenizer.encode("the answer is that way")[len(prompt) :]
    assert hf_generation._decode_after(tokenizer, prompt[-1], ids) == " that way"
    assert hf_generation._decode_after(tokenizer, prompt[-1], []) == ""


def test_special_tokens_that_mark_a_thought_stay_in_the_text(bpe_tokenizer: Any) -> None:
    """Skipped, as other special tokens are, they would make the thought a part of the answer."""
    tokenizer = copy.deepcopy(bpe_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "[OTHER]"]})
    ids = tokenizer.encode("[THINK]The capital[/THINK] of[OTHER] France", add_special_tokens=False)
    assert decode(tokenizer, ids) == "[THINK]The capital[/THINK] of France"
    assert hf_generation._decode_after(tokenizer, ids[1], ids) == "[THINK]The capital[/THINK] of France"
    assert decode(tokenizer, []) == ""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    named_nowhere = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    assert "[THINK]" not in named_nowhere.all_special_tokens  # special in tokenizer.json alone
    assert decode(named_nowhere, ids) == "[THINK]The capital[/THINK] of France"
    plain = tokenizer.encode("The capital[OTHER]", add_special_tokens=False)
    assert decode(tokenizer, plain) == "The capital"
