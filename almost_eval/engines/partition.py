"""Divide the samples of a run among processes, so that together they compute little more than one process would.

Pure functions on token ids: they need neither model nor weights, and every process that has the same samples and
settings comes to the same parts. Which part a sample is in never changes its numbers: each process plans the passes of
the whole run, and leaves out those that its own samples do not need (`LoglikelihoodEngine.stream(requests, wanted)`).

    partition_requests   log-likelihoods: cut where the passes are cut, so that common headers are all that is repeated
    partition_prompts    text: prompts behind one header together
    partition_lengths    rewards: texts of one length together

Each gives a `Partition`: `parts[k]` are the samples of process k, ascending; every sample is in one part, and no part
is empty while there are samples enough.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from almost_eval.engines.cuts import cut_trie
from almost_eval.engines.header_groups import header_groups
from almost_eval.engines.prefix import EncodedRequest, Ids, build_trie, plan_chunks


@dataclass(frozen=True, slots=True)
class Partition:
    """Which samples each of several processes computes, and what that costs."""

    parts: tuple[tuple[int, ...], ...]
    """Sample indices of each process, ascending."""
    tokens: tuple[int, ...]
    """Tokens that each process computes."""
    whole: int
    """Tokens that one process computes for all samples."""

    @property
    def extra(self) -> float:
        """What all processes compute beyond what one would, as a share of the latter."""
        return sum(self.tokens) / self.whole - 1 if self.whole else 0.0


@dataclass(frozen=True, slots=True)
class _Work:
    """What a sample needs: units of work, each computed once by a process whoever of its samples needs it."""

    size: Sequence[int]
    """Unit -> tokens."""
    parent: Sequence[int]
    """Unit -> the unit that it builds on, -1 where there is none."""
    needs: Sequence[frozenset[int]]
    """Sample -> units, those that they build on left out."""

    def closed(self, units: Collection[int]) -> set[int]:
        """The units with all that they build on."""
        whole: set[int] = set()
        for unit in units:
            while unit >= 0 and unit not in whole:
                whole.add(unit)
                unit = self.parent[unit]
        return whole

    def cost(self, units: Collection[int]) -> int:
        """Tokens of the units with all that they build on."""
        return sum(self.size[unit] for unit in self.closed(units))


def partition_requests(
    requests: Sequence[EncodedRequest],
    sample_of: Sequence[int],
    parts: int,
    *,
    n_samples: int | None = None,
    max_tokens: int = 1024,
    max_rows: int = 1024,
    max_sequences: int | None = None,
) -> Partition:
    """Divide samples whose continuations are scored, balanced by the tokens that a part makes the engine compute.

    Args:
        requests: of the whole run, as `encode` gave them.
        sample_of: (n_requests,) the sample that each belongs to.
        parts: processes, 1 or more.
        n_samples: samples of the run; those without a request cost nothing. None is the last of `sample_of` and one.
        max_tokens: of a forward pass, see `plan_chunks`: with an engine's own limits the cost is what it will compute.
        max_rows: see `plan_chunks`.
        max_sequences: see `plan_chunks`.
    """
    n_samples = max(sample_of, default=-1) + 1 if n_samples is None else n_samples
    trie = cut_trie(build_trie(requests), max_tokens=max_tokens, max_rows=max_rows, max_sequences=max_sequences)
    chunks = plan_chunks(trie, max_tokens=max_tokens, max_rows=max_rows, max_sequences=max_sequences)
    begins = np.array([chunk.begin for chunk in chunks], dtype=np.int64)

    def chunk_of(node: int) -> int:
        return int(np.searchsorted(begins, node, side="right")) - 1

    # A chunk builds on the one with the parent of its first node: what stands above that, stands above this too.
    parent = [-1] * len(chunks)
    path = np.full(int(trie.depth.max(initial=0)) + 2, -1, dtype=np.int64)  # depth -> last node there
    for number, chunk in enumerate(chunks):
        if trie.depth[chunk.begin]:
            parent[number] = chunk_of(int(path[trie.depth[chunk.begin] - 1]))
        path[trie.depth[chunk.begin : chunk.stop]] = np.arange(chunk.begin, chunk.stop)
    # The chunks of a sample are those with its targets.
    pairs = np.unique(
        trie.targets.slot * (len(chunks) + 1) + np.searchsorted(begins, trie.targets.node, side="right") - 1
    )
    of_slot: list[list[int]] = [[] for _ in trie.owners]
    for slot, chunk_number in zip(*(column.tolist() for column in np.divmod(pairs, len(chunks) + 1)), strict=True):
        of_slot[slot].append(chunk_number)
    needs: list[set[int]] = [set() for _ in range(n_samples)]
    first = [len(trie)] * n_samples  # node of the sample's first target, which orders the samples as the passes are
    node_of_slot = np.full(len(trie.owners), len(trie), dtype=np.int64)
    np.minimum.at(node_of_slot, trie.targets.slot, trie.targets.node)
    for slot, owners in enumerate(trie.owners):
        for request, _ in owners:
            sample = sample_of[request]
            needs[sample].update(of_slot[slot])
            first[sample] = min(first[sample], int(node_of_slot[slot]))
    work = _Work([chunk.stop - chunk.begin for chunk in chunks], parent, [frozenset(units) for units in needs])
    return _divide(work, _runs(work, sorted(range(n_samples), key=lambda sample: (first[sample], sample))), parts)


def partition_prompts(prompts: Sequence[Ids], parts: int, *, new_tokens: int) -> Partition:
    """Divide prompts (token ids) that are to be continued, those behind one header together.

    All continuations of a prompt together have `new_tokens` at most.
    """
    size: list[int] = []
    parent: list[int] = []
    needs: list[frozenset[int]] = [frozenset()] * len(prompts)
    order: list[int] = []
    for group in header_groups(prompts, new_tokens):
        header = len(size)
        size.append(group.shared)
        parent.append(-1)
        # By text, so that what is alike beyond the header stays together too.
        for prompt in sorted(group.prompts, key=lambda p: (prompts[p].astype(">u4").tobytes(), p)):
            needs[prompt] = frozenset([len(size)])
            size.append(len(prompts[prompt]) - group.shared + new_tokens)
            parent.append(header)
            order.append(prompt)
    work = _Work(size, parent, needs)
    return _divide(work, _runs(work, order), parts)


def partition_lengths(lengths: Sequence[int], parts: int) -> Partition:
    """Divide samples by the tokens of their texts, which are read alone, as those of a reward model.

    The longest come first: similar lengths share a batch.
    """
    work = _Work(lengths, [-1] * len(lengths), [frozenset([sample]) for sample in range(len(lengths))])
    return _divide(work, _runs(work, sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))), parts)


def partition_units(
    sizes: Sequence[int], needs: Sequence[frozenset[int]], blocks: Sequence[Sequence[int]], parts: int
) -> Partition:
    """Divide samples that need units of work, each computed once by a process whoever of its samples needs it.

    Args:
        sizes: tokens of each unit.
        needs: the units of each sample.
        blocks: samples that share units, as the units have them. They are parted only where that makes the parts more
            even and repeats little.
        parts: processes, 1 or more.
    """
    work = _Work(sizes, [-1] * len(sizes), needs)
    whole = [(list(block), frozenset().union(*(needs[sample] for sample in block))) for block in blocks]
    options = [_divide(work, runs, parts) for runs in (whole, _runs(work, [one for block in blocks for one in block]))]
    return min(options, key=lambda option: (option.extra > EXTRA, max(option.tokens)))


# --- the division ---

SLACKS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5)
"""How much more than needed the largest part may cost, where that saves tokens over all."""
EXTRA = 0.03
"""Share of repeated tokens up to which parts of equal cost come first, and beyond which fewer repeated tokens do."""


def _divide(work: _Work, runs: Sequence[tuple[list[int], frozenset[int]]], parts: int) -> Partition:
    """Parts of consecutive runs (samples, what they need together); the costliest costs as little as it can."""
    if parts < 1:
        raise ValueError(f"{parts} parts; there must be 1 or more")
    whole = work.cost({unit for needed in work.needs for unit in needed})
    # 1. The least bound that this many parts can keep, by bisection.
    low = max((work.cost(units) for _, units in runs), default=0)
    high = max(low, whole)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(work, runs, middle, parts)) <= parts:
            high = middle
        else:
            low = middle + 1
    # 2. The first bound near it that repeats little, or the one that repeats least.
    options = [_fill(work, runs, int(low * slack), parts) for slack in SLACKS]
    total = [sum(cost for _, cost in option) for option in options]
    little = [option for option, cost in zip(options, total, strict=True) if cost <= (1 + EXTRA) * whole]
    filled = little[0] if little else options[total.index(min(total))]
    groups = [samples for samples, _ in filled]
    # 3. Fewer runs than parts: no process is left without a sample while there is one, so lists are cut in two.
    groups += [[] for _ in range(parts - len(groups))]
    while [] in groups and (longest := max(groups, key=len)) and len(longest) > 1:
        at = groups.index(longest)
        half = len(longest) // 2
        groups.remove([])
        groups[at : at + 1] = [longest[:half], longest[half:]]
    costs = (work.cost({unit for sample in group for unit in work.needs[sample]}) for group in groups)
    return Partition(tuple(tuple(sorted(group)) for group in groups), tuple(costs), whole)


def _runs(work: _Work, order: Sequence[int]) -> list[tuple[list[int], frozenset[int]]]:
    """Neighbours in `order` that need the same units, together: dividing them would save no work."""
    runs: list[tuple[list[int], frozenset[int]]] = []
    for sample in order:
        if runs and runs[-1][1] == work.needs[sample]:
            runs[-1][0].append(sample)
        else:
            runs.append(([sample], work.needs[sample]))
    return runs


def _fill(
    work: _Work, runs: Sequence[tuple[list[int], frozenset[int]]], bound: int, parts_wanted: int
) -> list[tuple[list[int], int]]:
    """(samples, tokens) of parts that are filled one after the other, each with as much as `bound` allows.

    A part ends early where as many runs are left as parts are without one.
    """
    parts: list[tuple[list[int], int]] = []
    mine: list[int] = []
    units: set[int] = set()
    cost = 0
    for number, (samples, needed) in enumerate(runs):
        new = work.closed(needed)
        more = sum(work.size[unit] for unit in new - units)
        if mine and (cost + more > bound or len(runs) - number < parts_wanted - len(parts)):
            parts.append((mine, cost))
            mine, units, cost, more = [], set(), 0, sum(work.size[unit] for unit in new)
        mine.extend(samples)
        units |= new
        cost += more
    return [*parts, (mine, cost)] if mine else parts
