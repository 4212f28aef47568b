"""The token trie against sets of tuples, and joint encoding against lm-eval's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from almost_eval.engines.checkpoint_engine import rolling_windows
from almost_eval.engines.prefix import (
    Chunk,
    Collector,
    EncodedContinuation,
    EncodedRequest,
    TokenEncoder,
    TokenTrie,
    build_trie,
    chunks_to_compute,
    digest_ids,
    path_after,
    plan_chunks,
)
from almost_eval.errors import TemplateError
from almost_eval.types import LoglikelihoodRequest

Path = tuple[int, ...]
SEEDS = range(8)
SIZES = (1, 3, 7, 1000)


def request(prefix: Sequence[int], *scored: Sequence[int]) -> EncodedRequest:
    head = np.array(prefix, dtype=np.int32)
    tails = tuple(EncodedContinuation(head, np.array(tail, dtype=np.int32)) for tail in scored)
    return EncodedRequest(LoglikelihoodRequest("", ("",) * len(tails)), tails)


def random_requests(seed: int) -> list[EncodedRequest]:
    """Even seeds share a root token, odd ones do not; a small alphabet makes forks, repeats and nested inputs."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(int(rng.integers(1, 30))):
        context = rng.integers(0, 3, int(rng.integers(1, 12))).tolist()
        if seed % 2 == 0:
            context = [0, *context]
        tails = [rng.integers(0, 3, int(rng.integers(1, 5))).tolist() for _ in range(int(rng.integers(1, 4)))]
        requests.append(request(context, *tails))
    return requests


def inputs_of(requests: Iterable[EncodedRequest]) -> list[Path]:
    return [(*c.prefix.tolist(), *c.scored.tolist())[:-1] for r in requests for c in r.continuations]


def prefixes_of(requests: Iterable[EncodedRequest]) -> set[Path]:
    return {ids[: n + 1] for ids in inputs_of(requests) for n in range(len(ids))}


def paths_of(trie: TokenTrie) -> list[Path]:
    """Node -> the tokens from its root to it, followed by depth alone: independent of `end`."""
    paths: list[Path] = []
    last: dict[int, Path] = {-1: ()}
    for token, depth in zip(trie.token.tolist(), trie.depth.tolist(), strict=True):
        last[depth] = (*last[depth - 1], token)
        paths.append(last[depth])
    return paths


# --- the trie ---------------------------------------------------------------------------------------------------------


def test_the_example_in_the_docstring() -> None:
    a, b, c, d, e, f = range(6)
    trie = build_trie([request([a, b], [c, 9]), request([a], [b, d, e, 9], [f, 9])])
    assert trie.token.tolist() == [a, b, c, d, e, f]
    assert trie.depth.tolist() == [0, 1, 2, 2, 3, 1]
    assert trie.end.tolist() == [6, 5, 3, 5, 5, 6]
    assert trie.tokens_plain == 3 + 4 + 2
    assert trie.leaf.tolist() == [2, 4, 5]
    assert trie.ancestors(4).tolist() == [0, 1, 3]
    # a b | c 9 is read at nodes b and c; a | b d e 9 at a, b, d, e; a | f 9 at a, f. By node:
    assert trie.targets.node.tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    assert sorted(trie.targets.token.tolist()) == sorted([c, 9, b, d, e, 9, f, 9])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_nodes_are_the_distinct_prefixes(seed: int) -> None:
    requests = random_requests(seed)
    trie = build_trie(requests)
    paths = paths_of(trie)
    assert len(paths) == len(set(paths))
    assert set(paths) == prefixes_of(requests)
    assert paths == sorted(paths)  # depth-first order is the order of the prefixes
    for node, path in enumerate(paths):
        above = [u for u in range(len(trie)) if paths[u] == path[: len(paths[u])] and u != node]
        assert trie.ancestors(node).tolist() == above
        assert trie.end[node] == node + sum(other[: len(path)] == path for other in paths)
    assert trie.tokens_plain == sum(len(ids) for ids in inputs_of(requests))
    assert {paths[leaf] for leaf in trie.leaf} == set(inputs_of(requests))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_continuation_is_read_at_its_own_nodes(seed: int) -> None:
    requests = random_requests(seed)
    trie = build_trie(requests)
    paths = paths_of(trie)
    read: dict[int, list[tuple[Path, int]]] = {}
    for node, token, slot in zip(trie.targets.node, trie.targets.token, trie.targets.slot, strict=True):
        read.setdefault(int(slot), []).append((paths[node], int(token)))
    asked = {owner: slot for slot, owners in enumerate(trie.owners) for owner in owners}
    for r, one in enumerate(requests):
        for c, continuation in enumerate(one.continuations):
            prefix, scored = tuple(continuation.prefix.tolist()), continuation.scored.tolist()
            expected = [((*prefix, *scored[:i]), token) for i, token in enumerate(scored)]
            assert sorted(read[asked[r, c]]) == sorted(expected)
    distinct = {
        (*inputs_of([request(c.prefix.tolist(), c.scored.tolist())]), len(c.prefix), int(c.scored[-1]))
        for c in _all(requests)
    }
    assert len(trie.owners) == len(distinct)  # nothing is scored twice


def _all(requests: Iterable[EncodedRequest]) -> list[EncodedContinuation]:
    return [continuation for one in requests for continuation in one.continuations]


def test_nothing_to_score_is_an_empty_trie() -> None:
    trie = build_trie([])
    assert len(trie) == 0
    assert plan_chunks(trie, max_tokens=8, max_rows=8) == []


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_cache_always_holds_the_path_to_the_next_chunk(seed: int, size: int) -> None:
    trie = build_trie(random_requests(seed))
    paths = paths_of(trie)
    cache: list[int] = []  # nodes whose keys a model would hold
    for chunk in plan_chunks(trie, max_tokens=size, max_rows=size):
        assert cache == trie.ancestors(chunk.begin).tolist()
        assert tuple(trie.token[cache].tolist()) == paths[chunk.begin][:-1]
        keep_path, keep_chunk = path_after(trie, chunk)
        nodes = np.arange(chunk.begin, chunk.stop)
        cache = [*cache[:keep_path], *nodes[keep_chunk].tolist()]
        if chunk.stop < len(trie):
            assert keep_path + len(keep_chunk) == trie.depth[chunk.stop]
    assert cache == []


@pytest.mark.parametrize("limits", [(1, 1, None), (5, 1000, None), (1000, 2, None), (1000, 1000, 1), (6, 3, 2)])
@pytest.mark.parametrize("seed", SEEDS)
def test_chunks_cover_the_trie_within_their_limits(seed: int, limits: tuple[int, int, int | None]) -> None:
    max_tokens, max_rows, max_sequences = limits
    trie = build_trie(random_requests(seed))
    chunks = plan_chunks(trie, max_tokens=max_tokens, max_rows=max_rows, max_sequences=max_sequences)
    assert [c.begin for c in chunks] == [0, *(c.stop for c in chunks[:-1])]
    assert chunks[-1].stop == len(trie)
    assert [c.targets.start for c in chunks] == [0, *(c.targets.stop for c in chunks[:-1])]
    assert chunks[-1].targets.stop == len(trie.targets.node)
    for chunk in chunks:
        read = trie.targets.node[chunk.targets]
        assert chunk.begin < chunk.stop <= chunk.begin + max_tokens
        assert ((read >= chunk.begin) & (read < chunk.stop)).all()
        assert len(set(read.tolist())) <= max_rows
        if max_sequences is not None:
            assert ((trie.leaf >= chunk.begin) & (trie.leaf < chunk.stop)).sum() <= max_sequences
    later = plan_chunks(trie, max_tokens=max_tokens, max_rows=max_rows, begin=len(trie) // 2)
    assert later[0].begin == len(trie) // 2
    assert later[-1].stop == len(trie)


def _random_subset(seed: int, n: int) -> set[int]:
    rng = np.random.default_rng(seed)
    return set(rng.choice(n, int(rng.integers(0, n + 1)), replace=False).tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_needed_nodes_are_the_prefixes_of_the_wanted(seed: int) -> None:
    requests = random_requests(seed)
    trie = build_trie(requests)
    wanted = _random_subset(seed, len(requests))
    expected = prefixes_of(requests[r] for r in wanted)
    assert [path in expected for path in paths_of(trie)] == trie.needed(wanted).tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_chunk_that_is_computed_sees_computed_ancestors_only(seed: int, size: int) -> None:
    requests = random_requests(seed)
    trie = build_trie(requests)
    wanted = _random_subset(seed, len(requests))
    chunks = plan_chunks(trie, max_tokens=size, max_rows=size)
    compute = chunks_to_compute(trie, chunks, wanted)
    # By hand: chunks with a needed node, then, again and again, the chunks of all their nodes' ancestors.
    needed = trie.needed(wanted)
    chunk_of = {node: i for i, chunk in enumerate(chunks) for node in range(chunk.begin, chunk.stop)}
    closed = {chunk_of[node] for node in np.flatnonzero(needed).tolist()}
    while True:
        seen = {chunk_of[u] for i in closed for v in _nodes(chunks[i]) for u in trie.ancestors(v).tolist()}
        if seen <= closed:
            break
        closed |= seen
    assert set(np.flatnonzero(compute).tolist()) == closed


def _nodes(chunk: Chunk) -> range:
    return range(chunk.begin, chunk.stop)


# --- the collector ----------------------------------------------------------------------------------------------------


def _table(path: Path, token: int) -> float:
    """A model in one line: log p(token | path), any number will do."""
    return -math.fmod(abs(hash((path, token))) / 1e6, 7.0)


@pytest.mark.parametrize("wanted_seed", [None, 1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_sums_are_those_of_one_continuation_at_a_time(seed: int, wanted_seed: int | None) -> None:
    requests = random_requests(seed)
    trie = build_trie(requests)
    paths = paths_of(trie)
    wanted: Collection[int] = range(len(requests))
    if wanted_seed is not None:
        wanted = _random_subset(wanted_seed, len(requests))
    collector = Collector(trie, requests, wanted)
    found = {}
    for chunk in plan_chunks(trie, max_tokens=5, max_rows=5):
        part = chunk.targets
        nodes, tokens = trie.targets.node[part].tolist(), trie.targets.token[part].tolist()
        logprob = np.array([_table(paths[node], token) for node, token in zip(nodes, tokens, strict=True)])
        for index, scores in collector.add(part, logprob, logprob > -3.5):
            assert index not in found
            found[index] = scores
    assert found.keys() == set(wanted)
    for index, scores in found.items():
        for continuation, score in zip(requests[index].continuations, scores, strict=True):
            prefix, scored = tuple(continuation.prefix.tolist()), continuation.scored.tolist()
            each = [_table((*prefix, *scored[:i]), token) for i, token in enumerate(scored)]
            assert score.logprob == pytest.approx(sum(each), abs=1e-12)
            assert score.is_greedy == all(value > -3.5 for value in each)
            assert score.n_tokens == len(scored)


def test_a_score_that_is_not_a_number_stays_with_its_continuation() -> None:
    requests = [request([0], [1, 5], [2, 5])]
    trie = build_trie(requests)
    collector = Collector(trie, requests, {0})
    logprob = np.where(trie.targets.token == 1, np.nan, -1.0)
    [(_, scores)] = collector.add(slice(0, 4), logprob, np.ones(4, dtype=bool))
    assert math.isnan(scores[0].logprob)
    assert scores[1].logprob == -2.0


# --- encoding ---------------------------------------------------------------------------------------------------------

PAIRS = (
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),
    ("The capital of France is  \n", "Paris and more"),
    ("Human: hello\n\nAssistant:", " hello there"),
    ("numbers 1 2 3", " and 42."),
    ("The c", "at sat"),  # merges across the boundary
    ("<s>Human: hello", " there"),  # a chat template that wrote its own BOS
    ("An answer é", " 漢字"),
    ("", "hello"),
)


@pytest.fixture(scope="module")
def tokenizers(bpe_tokenizer: Any, sentencepiece_tokenizer: Callable[[bool], Any]) -> dict[str, Any]:
    return {
        "byte-level": bpe_tokenizer,
        "sentencepiece": sentencepiece_tokenizer(False),
        "sentencepiece-eos": sentencepiece_tokenizer(True),
    }


@pytest.fixture(params=["byte-level", "sentencepiece", "sentencepiece-eos"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def _encode(tokenizer: Any, context: str, *continuations: str) -> tuple[EncodedContinuation, ...]:
    return TokenEncoder(tokenizer).encode([LoglikelihoodRequest(context, continuations)])[0].continuations


def test_bos_once_and_no_eos(tokenizer: Any) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoder = TokenEncoder(tokenizer)
    assert encoder.special_prefix == (bos,)
    plain, own, empty = encoder.encode_texts(["hello world", "<s>hello world", ""])
    assert plain[0] == bos
    assert bos not in plain[1:]
    assert eos not in plain
    assert own[0] == bos
    assert bos not in own[1:]
    assert eos not in own
    assert empty.tolist() == [bos]


def test_an_eos_that_the_tokenizer_appends_is_left_out(tokenizers: dict[str, Any]) -> None:
    with_eos = tokenizers["sentencepiece-eos"]
    assert with_eos("hello")["input_ids"][-1] == with_eos.eos_token_id  # else this tests nothing
    for context, continuation in PAIRS:
        [ours], [plain] = (
            _encode(tokenizers[name], context, continuation) for name in ("sentencepiece-eos", "sentencepiece")
        )
        assert ours.prefix.tolist() == plain.prefix.tolist()
        assert ours.scored.tolist() == plain.scored.tolist()


def test_the_encoding_is_that_of_the_whole_text(tokenizer: Any) -> None:
    encoder = TokenEncoder(tokenizer)
    for context, continuation in PAIRS:
        [got] = _encode(tokenizer, context, continuation)
        assert [*got.prefix, *got.scored] == encoder.encode_texts([context + continuation])[0].tolist()
        assert got.n_positions == len(got.prefix) + len(got.scored) - 1


def test_trailing_space_moves_to_the_continuation(tokenizer: Any) -> None:
    [moved] = _encode(tokenizer, "The capital of France is ", "Paris")
    [plain] = _encode(tokenizer, "The capital of France is", " Paris")
    assert moved.prefix.tolist() == plain.prefix.tolist()
    assert moved.scored.tolist() == plain.scored.tolist()


def test_an_empty_context_is_the_bos(tokenizer: Any) -> None:
    for context in ("", "  "):
        [got] = _encode(tokenizer, context, "hello")
        assert got.prefix.tolist() == [tokenizer.bos_token_id]
        assert tokenizer.decode(got.scored).strip() == "hello"


def test_without_a_bos_the_eos_stands_in(bpe_tokenizer: Any) -> None:
    import tokenizers as rust
    from transformers import PreTrainedTokenizerFast

    bare = rust.Tokenizer.from_str(bpe_tokenizer.backend_tokenizer.to_str())
    bare.post_processor = rust.processors.Sequence([])
    gpt2_like = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    assert TokenEncoder(gpt2_like).special_prefix == ()
    [got] = _encode(gpt2_like, "", "hello")
    assert got.prefix.tolist() == [gpt2_like.eos_token_id]
    assert gpt2_like.decode(got.scored) == "hello"
    bare_of_all = PreTrainedTokenizerFast(tokenizer_object=bare)
    with pytest.raises(TemplateError, match="neither"):
        _encode(bare_of_all, "", "hello")
    [merged] = _encode(bare_of_all, "hello", " world")  # with a context nothing needs to stand in
    assert merged.prefix.tolist() == bare_of_all("hello")["input_ids"]


def test_a_merge_across_the_boundary_is_scored_whole(bpe_tokenizer: Any) -> None:
    encoder = TokenEncoder(bpe_tokenizer)
    [one] = encoder.encode([LoglikelihoodRequest("The capital of Fra", ("nce",))])
    [got] = one.continuations
    assert encoder.boundary_merges == 1
    # "a" and "n" are one token: what is scored begins with it, and "Fr" is what is left to condition on.
    assert bpe_tokenizer.decode(got.prefix) == "<s>The capital of Fr"
    assert bpe_tokenizer.decode(got.scored) == "ance"
    encoder.encode([LoglikelihoodRequest("The capital of", (" France",))])
    assert encoder.boundary_merges == 1


def test_continuations_of_one_context_share_its_array(bpe_tokenizer: Any) -> None:
    first, second = _encode(bpe_tokenizer, "The capital of France is", " Paris", " the cat")
    assert np.shares_memory(first.prefix, second.prefix)


@pytest.mark.parametrize("continuations", [("",), (" ok", ""), ()])
def test_nothing_to_score_is_refused(tokenizer: Any, continuations: tuple[str, ...]) -> None:
    with pytest.raises(TemplateError) as refused:
        _encode(tokenizer, "hello\nworld", *continuations)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])  # with an EOS, lm-eval would score it in the text
def test_ids_are_those_of_lm_eval(
    name: str, tokenizers: dict[str, Any], tiny_checkpoint: Callable[[str], os.PathLike[str]]
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizers[name]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama-gqa"))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu")
    same_split = 0
    for context, continuation in PAIRS:
        if context:
            prefix, scored = theirs._encode_pair(context, continuation)
        else:  # as in its `loglikelihood`
            prefix, scored = [theirs.prefix_token_id], theirs.tok_encode(continuation, add_special_tokens=False)
        [ours] = _encode(tokenizer, context, continuation)
        whole = [*ours.prefix.tolist(), *ours.scored.tolist()]
        assert whole == (theirs.tok_encode(context + continuation) if context else prefix + scored)
        if whole[: len(prefix)] == prefix:  # the tokenizer merges nothing across the boundary
            assert (ours.prefix.tolist(), ours.scored.tolist()) == (prefix, scored)
            same_split += 1
    assert same_split >= 7


def test_the_digest_reads_every_id_and_every_split() -> None:
    base = [request([1, 2], [3, 4])]
    others = [request([1, 2, 3], [4])], [request([1, 2], [3, 5])], [*base, *base], [request([1, 2], [3], [4])]
    digests = {digest_ids(requests) for requests in (base, *others)}
    assert len(digests) == 5
    assert digest_ids([request([1, 2], [3, 4])]) in digests


def test_rolling_windows() -> None:
    ids, first = np.arange(10, 21, dtype=np.int32), np.array([1], dtype=np.int32)  # 11 ids, 4 at a time
    pieces = [(context.tolist(), scored.tolist()) for context, scored in rolling_windows(ids, first, 4)]
    assert pieces == [
        ([1], [10, 11, 12, 13]),
        ([13], [14, 15, 16, 17]),
        ([16, 17], [18, 19, 20]),  # 2 + 3 - 1 positions: as much context as the window holds
    ]
    assert rolling_windows(ids[:3], first, 4)[0][1].tolist() == [10, 11, 12]
    assert rolling_windows(ids[:0], first, 4) == []


def test_sampled_ids_are_scored_as_they_are(tiny_checkpoint: Callable[[str], Any]) -> None:
    from transformers import AutoTokenizer

    encoder = TokenEncoder(AutoTokenizer.from_pretrained(tiny_checkpoint("llama-gqa")))
    (prompt,) = encoder.encode_texts(["Hello "])
    sampled = LoglikelihoodRequest("Hello ", ("ab",), token_ids=((7, 7, 5),))
    _, ids = encoder.encode([LoglikelihoodRequest("Hello", (" a",)), sampled])
    assert ids.continuations[0].prefix.tolist() == prompt.tolist()  # the trailing space too: it was read
    assert ids.continuations[0].scored.tolist() == [7, 7, 5]
    (bare,) = encoder.encode([LoglikelihoodRequest("", ("ab",), token_ids=((7,),))])
    assert len(bare.continuations[0].prefix) == 1
