"""Where a trie may be cut: into blocks that share nothing but long headers, so that a part of a run costs a part.

A chunk must be computed whenever one after it attends to it. Cut anywhere, each chunk holds a few ancestors of the
next ("Q: What is"), so whoever wants the last sample has to compute all before it: a resumed run would begin again, and
a shard would be a whole run. So chunks begin where few ancestors are left behind, and these few are computed twice:

    sequences    h h a b c,  h h a b d,  h h e f       header h h; at most one pass holds four tokens
    trie         h h a b c d e f
    cut          h h | a b c d | e f                   `a b` would be repeated if `d` began a block: a b c | a b d

A long path that is left behind by all cuts is a header, and is a block of its own: then it is computed once, and again
by each process that has a part of the run.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from almost_eval.engines.prefix import TokenTrie

SHARE = 64
"""A cut repeats about 1 / SHARE of the tokens of a pass at most."""


def cut_trie(trie: TokenTrie, *, max_tokens: int, max_rows: int, max_sequences: int | None = None) -> TokenTrie:
    """The trie with `cuts`: blocks that each fit a pass (see `plan_chunks`), in front of them what they repeat.

    The same scores: a repeated node has the token, the depth and the ancestors of the first, and nothing is read off
    it. Blocks end between two requests where they can.
    """
    rows = np.unique(trie.targets.node)
    inside = _inside_requests(trie)
    # 1. Blocks: (first node, one past the last, depth from which on the ancestors of the first are repeated).
    blocks: list[tuple[int, int, int]] = []
    begin, base = 0, 0
    headers: list[tuple[int, int]] = []  # depths [from, to) of the path to `begin`, each range of one earlier block
    while begin < len(trie):
        copies = int(trie.depth[begin]) - base
        stop = min(begin + max(1, max_tokens - copies), len(trie))
        for marks, limit in ((rows, max_rows), (trie.leaf, max_sequences)):
            if limit is not None:
                first = int(np.searchsorted(marks, begin))
                if first + limit < len(marks):
                    stop = min(stop, int(marks[first + limit]))
        kept, most = 0, (stop - begin) // SHARE
        if stop < len(trie):
            stop, kept = _cut(trie, inside, begin, stop, base, most)
        blocks.append((begin, stop, base))
        # A few tokens of a header that is left are repeated too: for them alone nobody shall compute all of it.
        headers.append((base, kept))
        while headers and headers[-1][0] >= kept:
            headers.pop()
        if headers and kept < headers[-1][1]:
            top, _ = headers.pop()
            if kept - top <= most:
                kept = top
            else:
                headers.append((top, kept))
        begin, base = stop, kept
    return _laid_out(trie, blocks)


def _inside_requests(trie: TokenTrie) -> NDArray[np.bool_]:
    """(n_nodes + 1,) True where a block that begins at the node would part the targets of a request."""
    n_requests = 1 + max((request for owners in trie.owners for request, _ in owners), default=-1)
    first_of_slot = np.full(len(trie.owners), len(trie), dtype=np.int64)
    last_of_slot = np.full(len(trie.owners), -1, dtype=np.int64)
    np.minimum.at(first_of_slot, trie.targets.slot, trie.targets.node)
    np.maximum.at(last_of_slot, trie.targets.slot, trie.targets.node)
    first = np.full(n_requests, len(trie), dtype=np.int64)
    last = np.full(n_requests, -1, dtype=np.int64)
    for slot, owners in enumerate(trie.owners):
        for request, _ in owners:
            first[request] = min(first[request], first_of_slot[slot])
            last[request] = max(last[request], last_of_slot[slot])
    spans = np.zeros(len(trie) + 2, dtype=np.int64)
    known = last >= 0
    np.add.at(spans, first[known] + 1, 1)
    np.add.at(spans, last[known] + 1, -1)
    return np.cumsum(spans)[:-1] > 0


def _cut(trie: TokenTrie, inside: NDArray[np.bool_], begin: int, limit: int, base: int, most: int) -> tuple[int, int]:
    """(where the block from `begin` ends, at most at `limit`; the depth from which on the next repeats its path)."""
    depth = trie.depth[begin : limit + 1]
    # Ancestors above the lowest depth since `begin` stand before this block: headers, which nobody repeats.
    lowest = np.minimum.accumulate(np.minimum(depth, base))
    left_behind = depth - lowest
    branches = np.flatnonzero(depth[1:] <= depth[:-1]) + 1  # where a sequence begins that is not its neighbour's end
    cheap = branches[left_behind[branches] <= most]
    between = cheap[~inside[begin + cheap]]
    for places in (between, cheap):
        if len(places):
            at = int(places[-1])
            return begin + at, int(lowest[at])
    # All that follows shares a long path with what begins here. The path is a block, so that it is computed alone.
    header = int(depth[branches[0]]) - int(depth[0]) if len(branches) else 0
    at = header if header > 0 else limit - begin
    return begin + at, int(depth[at])


def _laid_out(trie: TokenTrie, blocks: list[tuple[int, int, int]]) -> TokenTrie:
    """The nodes of the blocks end to end, each block behind the nodes that it repeats."""
    n = len(trie)
    place = np.empty(n, dtype=np.int64)  # node -> where it is laid
    source: list[NDArray[np.int64]] = []  # where it is laid -> the node
    end: list[NDArray[np.int64]] = []
    cuts: list[int] = []
    path = np.empty(int(trie.depth.max(initial=-1)) + 1, dtype=np.int64)  # depth -> node, of the path to the block
    open_nodes: dict[int, int] = {}  # depth -> where an ancestor of the block is laid, whose subtree goes on
    ends: dict[int, int] = {}  # where such a node is laid -> its end
    at = 0
    for begin, stop, base in blocks:
        cuts.append(at)
        for deep in [d for d in open_nodes if d >= base]:
            ends[open_nodes.pop(deep)] = at
        copies = path[base : int(trie.depth[begin])]
        nodes = np.concatenate([copies, np.arange(begin, stop)])
        place[begin:stop] = at + len(copies) + np.arange(stop - begin)
        here = trie.end[nodes]
        shift = at + len(copies) - begin
        end.append(np.minimum(here, stop) + shift)
        for deep in [d for d, laid in open_nodes.items() if trie.end[path[d]] <= stop and laid >= 0]:
            ends[open_nodes.pop(deep)] = int(trie.end[path[deep]]) + shift
        for offset in np.flatnonzero(here > stop).tolist():
            open_nodes[int(trie.depth[nodes[offset]])] = at + offset
        source.append(nodes)
        at += len(nodes)
        if stop < n:  # the path to the next block
            above = nodes[here > stop]
            path[trie.depth[above]] = above
    laid = np.concatenate([*source, np.empty(0, np.int64)])
    ending = np.concatenate([*end, np.empty(0, np.int64)])
    for node, its_end in ends.items():
        ending[node] = its_end
    return replace(
        trie,
        token=trie.token[laid],
        depth=trie.depth[laid],
        end=ending,
        targets=replace(trie.targets, node=place[trie.targets.node]),
        leaf=place[trie.leaf],
        cuts=np.array(cuts, dtype=np.int64),
    )
