"""Log-likelihoods on a transformers model: over a token trie (shared prefixes), or request by request (plain).

The shared path feeds any run of consecutive trie nodes as one row: position ids are depths, a 4-D mask lets a node
attend to its ancestors alone, and the cache holds the one path that leads to the run (see `prefix.py`). It needs a
model that takes position ids, a 4-D mask and a plain key-value cache; `hf_probe.py` measures whether this one does,
by comparing it with the plain path on this very checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from almost_eval.engines.checkpoint_engine import collected
from almost_eval.engines.hf_attention import BLOCK, ChunkPlan, LastLayer, additive, attending
from almost_eval.engines.hf_float32 import HALF, Head, corrected
from almost_eval.engines.prefix import (
    Chunk,
    Collector,
    EncodedContinuation,
    EncodedRequest,
    TokenTrie,
    chunks_to_compute,
    path_after,
    plan_chunks,
)
from almost_eval.errors import RunError
from almost_eval.types import ContinuationScore

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from almost_eval.models.loading import CausalLM

Cache = Any
"""transformers' `DynamicCache`, of whose layers its types do not say that they have keys and values."""
Results = Iterator[tuple[int, list[ContinuationScore]]]
_SLICE = {"cpu": 1 << 19}
"""Logits that are read together in float32: on a CPU 2 MiB, which stay in its cache between the passes over them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one forward pass may hold."""

    tokens: int
    """Token positions."""
    rows: int
    """Positions whose logits are read: bounds the logits at rows x vocabulary x 4 bytes (and one more for softmax)."""
    sequences: int | None = None
    """Input sequences, or None for as many as fit."""

    def halved(self) -> Limits | None:
        """Half of each after an out-of-memory error, or None where that is too little to go on."""
        if self.tokens <= 16:
            return None
        sequences = None if self.sequences is None else max(1, self.sequences // 2)
        return Limits(self.tokens // 2, max(1, self.rows // 2), sequences)


@dataclass(frozen=True, slots=True)
class AttentionWindow:
    """How far back a model's layers look."""

    size: int | None
    """Tokens, the present one included; None where every layer sees everything."""
    layer_types: tuple[str, ...]
    """Kinds of attention the model mixes (`full_attention`, `sliding_attention`), empty where all layers are alike."""

    @classmethod
    def of(cls, config: PretrainedConfig, longest: int) -> AttentionWindow:
        """Read a transformers config; a window no sequence reaches (`longest` tokens) is no window."""
        text = config.get_text_config()
        size = getattr(text, "sliding_window", None)
        kinds = tuple(dict.fromkeys(getattr(text, "layer_types", None) or ()))
        if getattr(text, "use_sliding_window", True) is False or size is None or size >= longest:
            return cls(None, ())
        return cls(int(size), kinds)


def length_dependence(config: PretrainedConfig, longest: int) -> str | None:
    """Why the same tokens score differently beside longer rows, or None."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for rope in (parameters, *parameters.values()):  # one for all layers, or one for each kind of layer
        if not isinstance(rope, dict) or rope.get("rope_type") not in {"dynamic", "longrope"}:
            continue
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
        if longest > original:
            return f"its rotary embedding ({rope['rope_type']}) changes with the length of the input beyond {original}"
    return None


# Windows that a model applies by itself, over places in the key-value cache. In a trie those are not distances, and a
# short probe does not reach the edge of the window, so the probe cannot tell.
_OWN_WINDOWS = ("window_size", "attention_window", "attention_window_size", "local_attention", "sliding_window_size")


def refusal(config: PretrainedConfig, longest: int) -> str | None:
    """Why prefixes cannot be shared on this model whatever its arithmetic says, or None."""
    if reason := length_dependence(config, longest):
        return reason
    text = config.get_text_config()
    if own := next((name for name in _OWN_WINDOWS if getattr(text, name, None)), None):
        return f"it applies an attention window of its own ({own} {getattr(text, own)})"
    odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd and longest > (getattr(text, "attention_chunk_size", None) or 0):
        return f"it has layers of kind {', '.join(sorted(odd))}"
    if config._attn_implementation not in {"sdpa", "eager"}:
        return f"attention {config._attn_implementation!r} takes no mask of our own; use --attention sdpa"
    return None


class SharedPrefixScorer:
    """Computes a trie chunk by chunk.

    Args:
        model: a transformers causal LM.
        window: how far back its layers look.
        block: queries that attend together, see `hf_attention`.
        dtype: of the mask: what the model computes in, or None for what its weights are stored in.
    """

    def __init__(
        self, model: CausalLM, window: AttentionWindow, *, block: int = BLOCK, dtype: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.window = window
        self.block = block
        self.dtype = dtype or model.dtype
        self.last_layer = LastLayer.of(model)
        self.head = Head(model) if model.dtype in HALF else None
        self.device = model.device
        self.limits_used: Limits | None = None

    @torch.inference_mode()
    def stream(
        self, trie: TokenTrie, requests: Sequence[EncodedRequest], wanted: Collection[int], limits: Limits
    ) -> Results:
        """Yield each wanted request when its last target is known. Chunks that no wanted request needs are skipped."""
        from transformers import DynamicCache

        collector = Collector(trie, requests, wanted)
        cache: Cache = DynamicCache()  # without the config: layers must keep everything, the mask does the windowing
        chunks = self._plan(trie, wanted, limits)
        while chunks:
            chunk, compute = chunks[0]
            if compute:
                try:
                    logprob, greedy = self._forward(trie, chunk, cache)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    if (smaller := limits.halved()) is None:
                        raise RunError(_no_memory(limits)) from error
                    limits = smaller
                    if past := int(trie.depth[chunk.begin]):
                        for layer in cache.layers:
                            layer.keys, layer.values = layer.keys[..., :past, :], layer.values[..., :past, :]
                    else:  # the pass that failed may have made some of the layers, and not all
                        cache = DynamicCache()
                    chunks = self._plan(trie, wanted, limits, begin=chunk.begin)
                    continue
                yield from collector.add(chunk.targets, logprob, greedy)
            self._advance(trie, chunk, cache)
            chunks.popleft()
        self.limits_used = limits

    @staticmethod
    def _plan(trie: TokenTrie, wanted: Collection[int], limits: Limits, begin: int = 0) -> deque[tuple[Chunk, bool]]:
        chunks = plan_chunks(
            trie, max_tokens=limits.tokens, max_rows=limits.rows, max_sequences=limits.sequences, begin=begin
        )
        return deque(zip(chunks, chunks_to_compute(trie, chunks, wanted).tolist(), strict=True))

    def _forward(self, trie: TokenTrie, chunk: Chunk, cache: Cache) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        nodes = slice(chunk.begin, chunk.stop)
        depth = torch.from_numpy(trie.depth[nodes].astype(np.int64)).to(self.device)  # (n,)
        end = torch.from_numpy(trie.end[nodes] - chunk.begin).to(self.device)  # (n,)
        token = torch.from_numpy(trie.token[nodes].astype(np.int64)).to(self.device)  # (n,)
        rows, row_of = np.unique(trie.targets.node[chunk.targets] - chunk.begin, return_inverse=True)
        if not len(rows):  # a piece of a header: only its keys and values matter
            rows = np.array([0])
        read = torch.from_numpy(rows).to(self.device)  # (rows,)
        allowed = self._visible(depth, end)
        masks = {kind: additive(seen, self.dtype)[None, None] for kind, seen in allowed.items()}
        last = self.last_layer
        few = read if last is not None and len(rows) < len(token) else None
        plan = ChunkPlan(allowed, masks, rows=few, last=last.attention if last else None, block=self.block)
        # An accelerator takes a chunk's attention in one kernel; blocks would be many small ones.
        blocks = attending(self.model, plan) if self.device.type == "cpu" else nullcontext()
        with blocks, last.reading(few, len(token)) if last else nullcontext(), self.head or nullcontext():
            logits = self.model(
                input_ids=token[None],
                position_ids=depth[None],
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=read,
            ).logits[0]  # (rows, vocabulary)
        return read_logits(logits, row_of, trie.targets.token[chunk.targets], self.head)

    def _visible(self, depth: torch.Tensor, end: torch.Tensor) -> dict[str, torch.Tensor]:
        """Kind of layer -> (n, past + n) bool: True where the key is an ancestor of the query or itself, and near."""
        n = len(depth)
        past = int(depth[0])
        index = torch.arange(n, device=self.device)  # (n,)
        shallowest = torch.cummin(depth, 0).values  # (n,) the cached path is shared down to this depth
        sees_past = torch.arange(past, device=self.device)[None] < shallowest[:, None]  # (n, past)
        sees_chunk = (index[None] <= index[:, None]) & (end[None] > index[:, None])  # (n, n)
        allowed = torch.cat([sees_past, sees_chunk], dim=1)  # (n, past + n)
        if self.window.size is None:
            return {"full_attention": allowed}
        key_depth = torch.cat([torch.arange(past, device=self.device), depth])  # (past + n,)
        near = allowed & (depth[:, None] - key_depth[None] < self.window.size)
        by_kind = {"full_attention": allowed, "sliding_attention": near}
        return {kind: by_kind[kind] for kind in self.window.layer_types or ("sliding_attention",)}

    def _advance(self, trie: TokenTrie, chunk: Chunk, cache: Cache) -> None:
        """Leave in the cache the path to the next chunk. A skipped chunk left no keys: zeros hold their place.

        Nothing that is computed attends to those zeros: they are gone from the path before (`chunks_to_compute`).
        """
        keep_path, keep_chunk = path_after(trie, chunk)
        past = int(trie.depth[chunk.begin])
        for layer in cache.layers:
            computed = layer.keys.shape[-2] > past
            kept = torch.from_numpy(past + keep_chunk).to(layer.keys.device)
            for name in ("keys", "values"):
                old = getattr(layer, name)  # (1, heads, past [+ n], head size)
                if computed:
                    new = old.index_select(-2, kept)
                else:
                    new = old.new_zeros((*old.shape[:-2], len(keep_chunk), old.shape[-1]))
                setattr(layer, name, torch.cat([old[..., :keep_path, :], new], dim=-2))


class PlainScorer:
    """Scores each distinct continuation as its own left-padded row: slower, and right for any causal LM."""

    def __init__(self, model: CausalLM, *, pad_id: int = 0, padding: bool = True) -> None:
        self.model = model
        self.pad_id = pad_id
        self.head = Head(model) if model.dtype in HALF else None
        self.padding = padding
        """False where this model's answer changes with left padding: then only rows of one length share a batch."""
        self.limits_used: Limits | None = None

    def stream(self, requests: Sequence[EncodedRequest], wanted: Collection[int], limits: Limits) -> Results:
        """Yield each wanted request when its last continuation is known; longest rows first."""
        sizes = {r: len(requests[r].continuations) for r in wanted}
        return collected(self._scores(requests, sizes.keys(), limits), sizes)

    @torch.inference_mode()
    def _scores(
        self, requests: Sequence[EncodedRequest], wanted: Collection[int], limits: Limits
    ) -> Iterator[tuple[tuple[int, int], ContinuationScore]]:
        """((request, number of its continuation), score) of the wanted requests."""
        owners: dict[tuple[bytes, int], list[tuple[int, int]]] = {}
        items: dict[tuple[bytes, int], EncodedContinuation] = {}
        for r, request in enumerate(requests):
            for c, continuation in enumerate(request.continuations):
                key = (continuation.prefix.tobytes() + continuation.scored.tobytes(), len(continuation.prefix))
                items.setdefault(key, continuation)
                owners.setdefault(key, []).append((r, c))
        keys = sorted(items, key=lambda k: (-items[k].n_positions, k))
        at = 0
        while at < len(keys):
            batch = self._batch(keys, at, items, limits)
            if any(r in wanted for key in batch for r, _ in owners[key]):
                try:
                    results = self._forward([items[key] for key in batch])
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    if len(batch) == 1 or (smaller := limits.halved()) is None:
                        raise RunError(_no_memory(limits)) from error
                    limits = smaller
                    continue
                for key, score in zip(batch, results, strict=True):
                    yield from (((r, c), score) for r, c in owners[key] if r in wanted)
            at += len(batch)
        self.limits_used = limits

    def _batch(
        self,
        keys: list[tuple[bytes, int]],
        at: int,
        items: dict[tuple[bytes, int], EncodedContinuation],
        limits: Limits,
    ) -> list[tuple[bytes, int]]:
        batch: list[tuple[bytes, int]] = []
        longest, scored = items[keys[at]].n_positions, 0
        for i in range(at, len(keys)):
            key = keys[i]
            scored = max(scored, len(items[key].scored))
            count = len(batch) + 1
            too_many = limits.sequences is not None and count > limits.sequences
            if batch and (too_many or count * longest > limits.tokens or count * scored > limits.rows):
                break
            if batch and not self.padding and items[key].n_positions != longest:
                break
            batch.append(key)
        return batch

    def _forward(self, batch: list[EncodedContinuation]) -> list[ContinuationScore]:
        device = self.model.device
        ids, real = padded_left([np.concatenate([c.prefix, c.scored])[:-1] for c in batch], self.pad_id)
        keep = max(len(c.scored) for c in batch)
        extra: dict[str, torch.Tensor] = {}  # each (B, T)
        if self.padding:
            extra["position_ids"] = (real.cumsum(1) - 1).clamp(min=0).to(device)
            extra["attention_mask"] = real.to(device)
        # (B, keep, V)
        with self.head or nullcontext():
            logits = self.model(input_ids=ids.to(device), use_cache=False, logits_to_keep=keep, **extra).logits
        scores = []
        for row, continuation in enumerate(batch):
            n = len(continuation.scored)
            logprob, greedy = read_logits(logits[row, -n:], np.arange(n), continuation.scored, self.head)
            scores.append(ContinuationScore(float(logprob.sum()), bool(greedy.all()), n))
        return scores


def padded_left(
    rows: Sequence[NDArray[np.int32] | tuple[int, ...]], pad: int, width: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T), padded on the left to `width` or more, and (B, T) 1 on real tokens; both int64."""
    longest = max(width, *(len(row) for row in rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    real = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.from_numpy(np.array(row, np.int64))
        real[number, longest - len(row) :] = 1
    return ids, real


def plain_tokens(requests: Sequence[EncodedRequest]) -> int:
    """Positions that `PlainScorer` computes, padding left out."""
    distinct = {
        (c.prefix.tobytes() + c.scored.tobytes(), len(c.prefix)): c.n_positions
        for r in requests
        for c in r.continuations
    }
    return sum(distinct.values())


def read_logits(
    logits: torch.Tensor, row: NDArray[np.int64], token: NDArray[np.int32], head: Head | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Read log p(token[i] | row[i]) in nats, and whether it is the row's most likely token.

    Args:
        logits: (rows, vocabulary), any float dtype; the softmax is taken in float32.
        row: (n,) rows to read.
        token: (n,) ids to read there.
        head: in half precision, what listened while the logits were made.
    """
    rows = torch.from_numpy(np.asarray(row)).to(logits.device)
    ids = torch.from_numpy(token.astype(np.int64)).to(logits.device)
    normaliser, likeliest = _summaries(logits)  # (rows,), (rows,)
    better = corrected(head, logits, rows, ids, (normaliser, likeliest)) if head else None
    if better is not None:
        logprob, greedy = better
    else:
        logprob = logits[rows, ids].float() - normaliser[rows]  # (n,) log p, nats
        greedy = likeliest[rows] == ids  # (n,)
    return logprob.double().cpu().numpy(), greedy.cpu().numpy()


def _summaries(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log of the sum of exponentials in float32, and the most likely token, of each row; both (rows,).

    Args:
        logits: (rows, vocabulary), any float dtype; float32 copies are of some rows at a time.
    """
    rows = max(1, _SLICE.get(logits.device.type, 1 << 26) // logits.shape[-1])
    parts = [(wide.logsumexp(-1), wide.argmax(-1)) for part in logits.split(rows) for wide in (part.float(),)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of a forward pass says that memory ran out."""
    # CPU allocation failures are plain RuntimeErrors, told apart by their text alone.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _no_memory(limits: Limits) -> str:
    return f"out of memory even with {limits.tokens} tokens in a batch; use a smaller dtype or another device"
