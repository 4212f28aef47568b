"""The pure part of shared-prefix scoring: joint encoding, the token trie, the batch plan. Needs numpy only.

Prompts of a benchmark repeat each other: TruthfulQA puts the same six shots before 817 questions, and each question
before every choice. All requests of a run form one trie over token ids. A model must visit each node once.

The trie is never built as a tree. Sort the sequences; what a sequence adds to the trie is what follows its longest
common prefix with its predecessor, so the additions, laid end to end, are the nodes in depth-first order:

    sequences   a b c      nodes  0 1 2 3 4 5
                a b d e    token  a b c d e f
                a f        depth  0 1 2 2 3 1
                           end    6 5 3 5 5 6      node u is an ancestor of v  <=>  u <= v < end[u]

Depth-first order has the property that the engine needs: of the nodes before position `p`, only the ancestors of node
`p` are ancestors of any node from `p` on. So a forward pass can take any run of consecutive nodes, with the
keys and values of one root-to-node path as its cache: no padding, no branch copied twice, nothing computed twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from almost_eval.errors import TemplateError
from almost_eval.models.tokenizers import Opening
from almost_eval.types import ContinuationScore, LoglikelihoodRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EncodedContinuation:
    """A continuation's token ids in its context. The first `start` ids of the joint encoding are not scored."""

    prefix: Ids
    """(start,) ids that are conditioned on; the same array object for all continuations where they agree."""
    scored: Ids
    """(n_tokens,) ids that are scored, n_tokens >= 1."""

    @property
    def n_positions(self) -> int:
        """Positions a model must compute to score it: the last id is only ever a target."""
        return len(self.prefix) + len(self.scored) - 1


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request with its token ids."""

    request: LoglikelihoodRequest
    continuations: tuple[EncodedContinuation, ...]
    """None for a rolling request whose text has no token: its log-likelihood is the empty sum, 0."""

    @property
    def n_positions(self) -> int:
        """Length of the longest input this request feeds to the model, in tokens."""
        return max((c.n_positions for c in self.continuations), default=0)


class TokenEncoder:
    """Encodes context and continuation jointly, with the tokenizer's own BOS exactly once.

    The tokenizer is one of transformers. The special tokens that the tokenizer puts around plain text are read off
    it once: those in front are kept, those behind (an EOS, on some) would end the text before it is scored and are
    left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.opening = Opening.of(tokenizer)
        self.special_prefix: tuple[int, ...] = self.opening.ids
        self.boundary_merges = 0
        """Continuations whose first token swallowed the end of the context: scored from that token on."""

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; texts that bring their opening (chat templates) get no second one."""
        encoded: list[Ids] = []
        for begin in range(0, len(texts), 512):  # blocks, so that the encoder's own objects stay few
            block = list(texts[begin : begin + 512])
            for text, ids in zip(block, self.tokenizer(block, add_special_tokens=False)["input_ids"], strict=True):
                encoded.append(np.array(self.opening.before(text, ids), dtype=np.int32))
        return encoded

    def encode(self, requests: Sequence[LoglikelihoodRequest]) -> list[EncodedRequest]:
        """Joint encoding, as lm-eval does it: trailing spaces of the context belong to the continuation.

        The split is where the encodings of `context` and `context + continuation` part; lm-eval splits at the length
        of the former, which is the same unless the tokenizer merges across the boundary.

        Raises:
            TemplateError: a continuation that adds no token, or a request without continuations.
        """
        if empty := next((r for r in requests if not r.continuations), None):
            raise TemplateError(f"no continuations to score after a context that ends in {empty.context[-40:]!r}")
        # Sampled ids are scored as they are, after all of their context.
        pairs = [
            [] if r.token_ids else [_shift_trailing_space(r.context, c) for c in r.continuations] for r in requests
        ]
        # Every distinct text once: the contexts, and each context with each of its continuations.
        index: dict[str, int] = {}
        for request, row in zip(requests, pairs, strict=True):
            if request.token_ids:
                index.setdefault(request.context, len(index))
            for context, continuation in row:
                index.setdefault(context, len(index))
                index.setdefault(context + continuation, len(index))
        ids = self.encode_texts(list(index))
        encoded = []
        for request, row in zip(requests, pairs, strict=True):
            continuations = []
            if request.token_ids:
                alone = ids[index[request.context]]
                prefix = alone if len(alone) else self.stand_in()
                continuations = [EncodedContinuation(prefix, np.array(t, dtype=np.int32)) for t in request.token_ids]
            for context, continuation in row:
                alone, whole = ids[index[context]], ids[index[context + continuation]]
                start = common_prefix_length(alone, whole) if context else len(self.special_prefix)
                self.boundary_merges += bool(context) and start < len(alone)
                # One array for all continuations of a context. With nothing to condition on, the BOS (or else the
                # EOS) stands in, as in lm-eval.
                prefix = alone[:start] if start else self.stand_in()
                if start >= len(whole):
                    raise TemplateError(
                        f"continuation {continuation!r} adds no token after a context that ends in "
                        f"{context[-40:]!r}; check the template and the tokenizer"
                    )
                continuations.append(EncodedContinuation(prefix, whole[start:].copy()))
            encoded.append(EncodedRequest(request, tuple(continuations)))
        return encoded

    def stand_in(self) -> Ids:
        """(1,) the BOS, or else the EOS: what a model reads where there is no text to start from.

        Raises:
            TemplateError: the tokenizer has neither.
        """
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return np.array([token_id], dtype=np.int32)
        raise TemplateError("an empty context needs a BOS or EOS token to start from, and the tokenizer has neither")


def _shift_trailing_space(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def scores_of_nothing(
    requests: Sequence[EncodedRequest], wanted: Collection[int]
) -> Iterator[tuple[int, list[ContinuationScore]]]:
    """(index, no scores) of each wanted request that has nothing to score."""
    return ((index, []) for index in sorted(wanted) if not requests[index].continuations)


def common_prefix_length(a: Ids, b: Ids) -> int:
    """How many leading ids two sequences share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def digest_ids(requests: Sequence[EncodedRequest]) -> str:
    """sha256 over every token id of every request, in order: two runs with the same digest read the same prompts."""
    digest = hashlib.sha256()
    for request in requests:
        for continuation in request.continuations:
            header = np.array([len(continuation.prefix), len(continuation.scored)], dtype=np.int32)
            for part in (header, continuation.prefix, continuation.scored):
                digest.update(part.astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Targets:
    """What is read off the model: the log-probability of `token[i]` at node `node[i]`, added to `slot[i]`."""

    node: NDArray[np.int64]
    """(n,) trie nodes, ascending."""
    token: Ids
    """(n,)"""
    slot: NDArray[np.int64]
    """(n,) distinct continuations; a slot's score is the sum over its targets."""


@dataclass(frozen=True, slots=True)
class TokenTrie:
    """All requests of a run as one trie in depth-first order."""

    token: Ids
    """(n_nodes,)"""
    depth: Ids
    """(n_nodes,) position of the node in its sequence: its position id, and the number of its ancestors."""
    end: NDArray[np.int64]
    """(n_nodes,) one past the last descendant."""
    targets: Targets
    owners: list[list[tuple[int, int]]]
    """slot -> every (request, continuation) that asks for it."""
    leaf: NDArray[np.int64]
    """(n_sequences,) last node of each distinct input sequence, ascending."""
    tokens_plain: int
    """Positions a run without sharing would compute."""
    cuts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Nodes at which a forward pass has to begin, ascending; see `cuts.cut_trie`."""

    def __len__(self) -> int:
        return len(self.token)

    def ancestors(self, node: int) -> NDArray[np.int64]:
        """The nodes from the root down to, and without, `node`."""
        before = np.arange(node)
        return before[self.end[:node] > node]

    def needed(self, wanted: Collection[int]) -> NDArray[np.bool_]:
        """(n_nodes,) True where a wanted request reads the node or one of its descendants."""
        slots = [slot for slot, owners in enumerate(self.owners) if any(request in wanted for request, _ in owners)]
        used = np.zeros(len(self) + 1, dtype=np.int64)
        np.add.at(used, self.targets.node[np.isin(self.targets.slot, slots)] + 1, 1)
        before = np.cumsum(used)  # before[v]: wanted targets among nodes < v
        return before[self.end] > before[:-1]


def build_trie(requests: Sequence[EncodedRequest]) -> TokenTrie:
    """Sort, lay end to end, keep what is new. O(tokens log sequences); memory O(distinct input tokens)."""
    # Distinct inputs by their bytes (big-endian, so that byte order is token order), and what is read off each:
    # (first scored position, last target, slot). Single-token choices of one question share one input.
    inputs: dict[bytes, list[tuple[int, int, int]]] = {}
    slots: dict[tuple[bytes, int, int], int] = {}
    owners: list[list[tuple[int, int]]] = []
    tokens_plain = 0
    for r, request in enumerate(requests):
        for c, continuation in enumerate(request.continuations):
            whole = np.concatenate([continuation.prefix, continuation.scored])
            key, start, last = whole[:-1].astype(">i4").tobytes(), len(continuation.prefix), int(whole[-1])
            slot = slots.setdefault((key, start, last), len(slots))
            if slot == len(owners):
                owners.append([])
                inputs.setdefault(key, []).append((start, last, slot))
            owners[slot].append((r, c))
            tokens_plain += len(whole) - 1

    size = sum(len(key) // 4 for key in inputs)
    token, depth, end = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int64)
    path = np.empty(max((len(key) // 4 for key in inputs), default=0), np.int64)  # nodes of the previous input
    target_node: list[NDArray[np.int64]] = []
    target_token: list[Ids] = []
    target_slot: list[NDArray[np.int64]] = []
    leaf = []
    previous = np.empty(0, np.int32)
    n = 0
    for key in sorted(inputs):
        ids = np.frombuffer(key, dtype=">i4").astype(np.int32)
        shared = common_prefix_length(previous, ids)
        end[path[shared : len(previous)]] = n  # the branch that this input leaves is complete
        new = len(ids) - shared
        path[shared : len(ids)] = np.arange(n, n + new)
        token[n : n + new] = ids[shared:]
        depth[n : n + new] = np.arange(shared, len(ids))
        n += new
        leaf.append(int(path[len(ids) - 1]))
        for start, last, slot in inputs[key]:
            target_node.append(path[start - 1 : len(ids)].copy())
            target_token.append(np.append(ids[start:], np.int32(last)))
            target_slot.append(np.full(len(ids) - start + 1, slot, np.int64))
        previous = ids
    end[path[: len(previous)]] = n

    nodes = np.concatenate([*target_node, np.empty(0, np.int64)])
    by_node = np.argsort(nodes, kind="stable")
    targets = Targets(
        nodes[by_node],
        np.concatenate([*target_token, np.empty(0, np.int32)])[by_node],
        np.concatenate([*target_slot, np.empty(0, np.int64)])[by_node],
    )
    # `.copy()`: what was shared is free again
    return TokenTrie(
        token[:n].copy(),
        depth[:n].copy(),
        end[:n].copy(),
        targets,
        owners,
        np.unique(leaf).astype(np.int64),
        tokens_plain,
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive nodes [begin, stop) that one forward pass computes."""

    begin: int
    stop: int
    targets: slice
    """Its part of `TokenTrie.targets`."""


def plan_chunks(
    trie: TokenTrie, *, max_tokens: int, max_rows: int, max_sequences: int | None = None, begin: int = 0
) -> list[Chunk]:
    """Cut the trie into forward passes.

    Args:
        trie: what to compute.
        max_tokens: nodes in a pass.
        max_rows: nodes in a pass whose logits are read; bounds the logits at `max_rows x vocabulary`.
        max_sequences: input sequences that may end in a pass (`--batch-size`), or None.
        begin: the first node to plan for.
    """
    rows = np.unique(trie.targets.node)
    chunks = []
    while begin < len(trie):
        stop = min(begin + max_tokens, len(trie))
        for marks, limit in ((rows, max_rows), (trie.leaf, max_sequences)):
            if limit is not None:
                first = int(np.searchsorted(marks, begin))
                if first + limit < len(marks):
                    stop = min(stop, int(marks[first + limit]))
        stop = min([stop, *trie.cuts[np.searchsorted(trie.cuts, begin + 1) :][:1].tolist()])
        lo, hi = np.searchsorted(trie.targets.node, [begin, stop])
        chunks.append(Chunk(begin, stop, slice(int(lo), int(hi))))
        begin = stop
    return chunks


def chunks_to_compute(trie: TokenTrie, chunks: Sequence[Chunk], wanted: Collection[int]) -> NDArray[np.bool_]:
    """(n_chunks,) True where a wanted request needs the chunk, or a chunk that is computed attends to it.

    A chunk is computed whole, so nodes that nobody wants must see their real ancestors too: elsewhere they would
    only be wrong, but a mixture of experts would send them to other experts, and the shapes of those batches reach
    the last bits of the wanted nodes.
    """
    used = np.concatenate([[0], np.cumsum(trie.needed(wanted))])
    compute = np.zeros(len(chunks), dtype=bool)
    nearest = len(trie)  # where the next chunk that is computed begins
    for i in range(len(chunks) - 1, -1, -1):
        begin, stop = chunks[i].begin, chunks[i].stop
        compute[i] = used[stop] > used[begin] or int(trie.end[begin:stop].max()) > nearest
        if compute[i]:
            nearest = begin
    return compute


def path_after(trie: TokenTrie, chunk: Chunk) -> tuple[int, NDArray[np.int64]]:
    """Which cached positions the next chunk needs: (how many of the old path, which of this chunk's nodes).

    The cache before `chunk` holds the path to `chunk.begin`, one entry per depth. The path to `chunk.stop` is its
    head, down to the shallowest depth visited since, and the nodes of the chunk whose subtree goes on.
    """
    if chunk.stop >= len(trie):
        return 0, np.empty(0, np.int64)
    keep_path = int(trie.depth[chunk.begin : chunk.stop + 1].min())
    keep_chunk = np.flatnonzero(trie.end[chunk.begin : chunk.stop] > chunk.stop)
    return keep_path, keep_chunk


class Collector:
    """Adds up target log-probabilities and gives each wanted request back once its last target is known."""

    def __init__(self, trie: TokenTrie, requests: Sequence[EncodedRequest], wanted: Collection[int]) -> None:
        self._owners = trie.owners
        self._targets = trie.targets
        self._requests = requests
        n_slots = len(trie.owners)
        self._logprob = np.zeros(n_slots)
        self._greedy = np.ones(n_slots, dtype=bool)
        self._targets_left = np.bincount(trie.targets.slot, minlength=n_slots)
        self._slots = [np.zeros(len(r.continuations), dtype=np.int64) for r in requests]
        for slot, owners in enumerate(trie.owners):
            for request, continuation in owners:
                self._slots[request][continuation] = slot
        self._slots_left = {r: len(set(self._slots[r].tolist())) for r in wanted}

    def add(
        self, targets: slice, logprob: NDArray[np.float64], greedy: NDArray[np.bool_]
    ) -> Iterator[tuple[int, list[ContinuationScore]]]:
        """Take the (n,) log-probabilities of some targets; yield the requests that are complete with them."""
        slot = self._targets.slot[targets]
        np.add.at(self._logprob, slot, logprob)
        np.logical_and.at(self._greedy, slot, greedy)
        np.subtract.at(self._targets_left, slot, 1)
        for done in np.unique(slot[self._targets_left[slot] == 0]).tolist():
            for request in {r for r, _ in self._owners[done]} & self._slots_left.keys():
                self._slots_left[request] -= 1
                if self._slots_left[request] == 0:
                    yield request, self._scores(request)

    def _scores(self, request: int) -> list[ContinuationScore]:
        return [
            ContinuationScore(float(self._logprob[slot]), bool(self._greedy[slot]), len(continuation.scored))
            for slot, continuation in zip(
                self._slots[request].tolist(), self._requests[request].continuations, strict=True
            )
        ]
