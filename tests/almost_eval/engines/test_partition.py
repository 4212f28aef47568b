"""Where a trie is cut, and how the samples of a run are divided: what each part costs is what the engine computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from almost_eval.engines.cuts import cut_trie
from almost_eval.engines.partition import Partition, partition_lengths, partition_prompts, partition_requests
from almost_eval.engines.prefix import (
    EncodedContinuation,
    EncodedRequest,
    TokenTrie,
    build_trie,
    chunks_to_compute,
    plan_chunks,
)
from almost_eval.types import LoglikelihoodRequest


def request(context: list[int], *continuations: list[int]) -> EncodedRequest:
    prefix = np.array(context, np.int32)
    texts = tuple("x" for _ in continuations)
    scored = tuple(EncodedContinuation(prefix, np.array(c, np.int32)) for c in continuations)
    return EncodedRequest(LoglikelihoodRequest("", texts), scored)


def few_shot(seed: int, samples: int = 60, header: int = 40) -> list[EncodedRequest]:
    """Questions behind one header, many of which begin alike, two continuations each."""
    rng = np.random.default_rng(seed)
    shared = list(range(1000, 1000 + header))
    return [
        request(
            shared + rng.integers(0, 3, 3).tolist() + rng.integers(0, 500, int(rng.integers(4, 30))).tolist(),
            rng.integers(0, 500, 4).tolist(),
            rng.integers(0, 500, 2).tolist(),
        )
        for _ in range(samples)
    ]


def sequences(trie: TokenTrie) -> dict[int, tuple[list[int], list[int]]]:
    """Slot -> (the tokens down to its first target, the tokens that are scored)."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for node, token, slot in zip(trie.targets.node, trie.targets.token, trie.targets.slot, strict=True):
        path = [*trie.ancestors(int(node)).tolist(), int(node)]
        assert trie.depth[path].tolist() == list(range(len(path)))
        found.setdefault(int(slot), (trie.token[path].tolist(), []))[1].append(int(token))
    return found


@pytest.mark.parametrize("limits", [(128, 1024, None), (200, 30, None), (1024, 1024, 4), (7, 3, None), (4096, 4096, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_a_cut_trie_holds_the_same_sequences(seed: int, limits: tuple[int, int, int | None]) -> None:
    whole = build_trie(few_shot(seed))
    sizes = {"max_tokens": limits[0], "max_rows": limits[1], "max_sequences": limits[2]}
    cut = cut_trie(whole, **sizes)  # type: ignore[arg-type]
    assert sequences(cut) == sequences(whole)
    assert cut.token[cut.leaf].tolist() == whole.token[whole.leaf].tolist()
    # A node ends where the next begins that is not below it.
    for node in range(len(cut)):
        after = np.flatnonzero(cut.depth[node + 1 :] <= cut.depth[node])
        assert cut.end[node] == (node + 1 + after[0] if len(after) else len(cut))
    chunks = plan_chunks(cut, **sizes)  # type: ignore[arg-type]
    assert [chunk.begin for chunk in chunks] == cut.cuts.tolist()
    assert max(chunk.stop - chunk.begin for chunk in chunks) <= limits[0]
    assert len(whole) <= len(cut) <= 1.05 * len(whole)


def test_the_last_sample_needs_the_header_and_its_own_chunk_alone() -> None:
    requests = few_shot(0)
    trie = cut_trie(build_trie(requests), max_tokens=256, max_rows=256)
    chunks = plan_chunks(trie, max_tokens=256, max_rows=256)
    assert len(chunks) > 6
    last = max(trie.owners[int(trie.targets.slot[-1])])[0]
    needed = np.flatnonzero(chunks_to_compute(trie, chunks, {last}))
    assert needed.tolist() == [0, len(chunks) - 1]
    # Without cuts a chunk holds the beginning of the next, so all before are needed.
    plain = build_trie(requests)
    chunks = plan_chunks(plain, max_tokens=256, max_rows=256)
    assert chunks_to_compute(plain, chunks, {last}).sum() > 2


def check(partition: Partition, samples: int, parts: int) -> None:
    assert sorted(sample for part in partition.parts for sample in part) == list(range(samples))
    assert len(partition.parts) == len(partition.tokens) == parts
    assert all(list(part) == sorted(part) for part in partition.parts)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_part_costs_what_its_chunks_hold(parts: int) -> None:
    requests = few_shot(1) + few_shot(2, samples=20, header=300)
    sample_of = [i // 2 for i in range(len(requests))]
    limits = {"max_tokens": 200, "max_rows": 200}
    partition = partition_requests(requests, sample_of, parts, **limits)
    check(partition, len(requests) // 2, parts)
    trie = cut_trie(build_trie(requests), **limits)
    chunks = plan_chunks(trie, **limits)
    sizes = np.array([chunk.stop - chunk.begin for chunk in chunks])
    for part, tokens in zip(partition.parts, partition.tokens, strict=True):
        wanted = {r for r, sample in enumerate(sample_of) if sample in part}
        assert sizes[chunks_to_compute(trie, chunks, wanted)].sum() == tokens
    assert partition.whole == len(trie)
    assert (partition.extra == 0) == (parts == 1)


def test_few_samples_and_samples_without_requests() -> None:
    requests = [request([1, 2, 3], [4]), request([1, 2, 5], [4])]
    partition = partition_requests(requests, [0, 2], 3, n_samples=4)
    check(partition, 4, 3)
    assert all(partition.parts)
    check(partition_requests(requests, [0, 1], 3), 2, 3)  # one has none
    check(partition_requests([], [], 2), 0, 2)


def test_prompts_behind_one_header_stay_together() -> None:
    headers = [list(range(h, h + 400)) for h in (0, 1000, 2000, 3000)]
    prompts = [np.array([*headers[i % 4], 5000 + i, 7], np.int32) for i in range(40)]
    partition = partition_prompts(prompts, 4, new_tokens=8)
    check(partition, 40, 4)
    assert sorted(part[0] for part in partition.parts) == [0, 1, 2, 3]
    assert all({sample % 4 for sample in part} == {part[0] % 4} for part in partition.parts)
    assert partition.extra == 0


def test_texts_of_one_length_stay_together() -> None:
    lengths = [10, 400, 20, 300, 30, 200]
    partition = partition_lengths(lengths, 2)
    check(partition, 6, 2)
    assert partition.parts == ((1,), (0, 2, 3, 4, 5)) or max(partition.tokens) <= 560
    assert partition.extra == 0


@pytest.mark.parametrize(
    ("task", "protocol"), [pytest.param("hhh", "choice", marks=pytest.mark.slow), ("hhh", "reward"), ("truthfulqa", "")]
)
def test_shards_of_real_data_compute_little_more(task: str, protocol: str, data_root: Path) -> None:
    """At most 5 % more tokens than one process, for 2, 4 and 8 shards, and none has much more than its share."""
    from almost_eval.run.runner import RunRequest, open_run

    model = "nano/reward" if protocol == "reward" else "nano/vanilla-small"
    run = open_run(RunRequest(task=task, protocol=protocol, model=model, data="hub", data_root=str(data_root)))
    for parts in (2, 4, 8):
        partition = run.partition(parts)
        check(partition, len(run.samples), parts)
        assert partition.extra <= 0.05
        assert max(partition.tokens) <= 1.25 * partition.whole / parts
