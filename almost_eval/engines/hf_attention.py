"""Leaves out what a pass over a trie chunk need not compute: keys that no query sees, and last-layer rows without use.

Of the nodes before a block of queries only the path to the block can be visible to it (see `prefix.py`). So attention
goes block by block, over the columns that the mask leaves open. Of the last layer only keys and values are needed at
rows without a scored continuation. Both leave every number that is read as it was, up to rounding: `hf_probe.py` runs
with both, and the engine takes the plain path where the numbers of a model differ.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from almost_eval.models.loading import cpu_has_bfloat16

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM

Inputs = tuple[torch.Tensor, ...]

NAME = "almost_visible_sdpa"
"""Name of `visible_attention` in transformers' registry."""

BLOCK = 64
"""Queries in a block. Small blocks see few keys in vain, large ones copy few keys."""

SCORES = 1 << 20
"""Attention scores that are computed at a time: 2 MiB, which stays in the cache."""

EVERY = 4
"""One key in so many is looked at for a large score of each query."""

WIDTH = 64
"""In bfloat16 a block has a multiple of so many keys: oneDNN makes, and keeps, a kernel for each number of them."""

GAP = 0.1
"""Part of a block's columns that may be masked off before it is cheaper to copy the others out."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries and the keys that any of them sees."""

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    mask: torch.Tensor
    """(1, 1, queries, keys) additive."""


class ChunkPlan:
    """Who sees whom in one forward pass, worked out once for all layers.

    Args:
        allowed: kind of layer -> (n, past + n) bool, True where the query sees the key. Every query sees itself.
        masks: kind of layer -> (1, 1, n, past + n) additive, the very tensors that the model gets.
        rows: (r,) positions whose last-layer output is read, ascending; None where it is all of them.
        last: the attention module of the last layer, where it is known.
        block: queries in a block.
    """

    def __init__(
        self,
        allowed: Mapping[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor],
        *,
        rows: torch.Tensor | None = None,
        last: nn.Module | None = None,
        block: int = BLOCK,
    ) -> None:
        self._allowed = allowed
        self._masks = masks
        self._kind_of = {identity(mask): kind for kind, mask in masks.items()}
        self._rows = rows
        self._last = last
        self._block = block
        half = any(mask.dtype is torch.bfloat16 for mask in masks.values())
        self._width = WIDTH if half and cpu_has_bfloat16() else 1
        self._blocks: dict[tuple[str, bool], list[Block]] = {}

    def blocks(self, mask: torch.Tensor | None, module: nn.Module) -> list[Block] | None:
        """The blocks for a layer that was handed `mask`, or None where that is no mask of this plan."""
        if (kind := self._kind_of.get(identity(mask))) is None:
            return None
        rows = self._rows if module is self._last else None
        key = (kind, rows is not None)
        if key not in self._blocks:
            self._blocks[key] = list(self._cut(self._allowed[kind], self._masks[kind], rows))
        return self._blocks[key]

    def _cut(self, allowed: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor | None) -> Iterator[Block]:
        n = len(allowed) if rows is None else len(rows)
        for begin in range(0, n, self._block):
            span = slice(begin, min(begin + self._block, n))
            queries = span if rows is None else rows[span]
            columns = allowed[queries].any(0).nonzero()[:, 0]
            first, last = int(columns[0]), int(columns[-1])
            part = mask[:, :, queries]
            # A view where the mask leaves little out (it goes on hiding that); else a copy of what is seen.
            if len(columns) >= (1 - GAP) * (last - first + 1):
                keys = self._widened(first, last + 1, allowed.shape[1])
                yield Block(queries, keys, part[..., keys])
            else:
                more = -len(columns) % self._width
                hidden = part.new_full((*part.shape[:3], more), torch.finfo(part.dtype).min)
                yield Block(
                    queries,
                    torch.cat([columns, columns.new_zeros(more)]),
                    torch.cat([part.index_select(-1, columns), hidden], -1),
                )

    def _widened(self, begin: int, end: int, total: int) -> slice:
        """The columns with as many more, which the mask hides, as make their number one of few."""
        size = min(total, end - begin + -(end - begin) % self._width)
        end = min(total, begin + size)
        return slice(end - size, end)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of the same shape as `seen` (bool), to be added to the scores of attention."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def identity(tensor: torch.Tensor | None) -> tuple[int, tuple[int, ...], torch.dtype] | None:
    """The same for a tensor and for views of all of it: models may hand their layers a view of what they got."""
    return None if tensor is None else (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)


_plan: ContextVar[ChunkPlan | None] = ContextVar("plan of the chunk that is being computed", default=None)

# Arguments that transformers' sdpa function takes and does not look at, though they may be tensors.
_IGNORED = {"position_ids", "cache_position", "position_embeddings"}


def visible_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' `sdpa` for a layer of the chunk under way, block by block; that function itself for all else.

    Args:
        module: the attention layer.
        query: (1, heads, n, size)
        key: (1, key heads, past + n, size)
        value: (1, key heads, past + n, value size)
        attention_mask: (1, 1, n, past + n)
        dropout: anything but 0 is left to transformers.
        scaling: of the scores, or None for 1 / sqrt(size).
        kwargs: what this model's other attention functions take.

    Returns:
        (1, n, heads, value size), zero at rows that nobody reads; and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plan = _plan.get()
    blocks = None if plan is None else plan.blocks(attention_mask, module)
    # Other tensors, such as a position bias or attention sinks, change the scores in ways this code does not compute.
    foreign = any(isinstance(value, torch.Tensor) and name not in _IGNORED for name, value in kwargs.items())
    fits = len(query) == 1 and query.shape[1] % key.shape[1] == 0
    if blocks is None or foreign or dropout or not fits:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    out = query.new_zeros((1, query.shape[2], query.shape[1], value.shape[-1]))
    for block in blocks:
        part = _attend(query[:, :, block.queries], _columns(key, block), _columns(value, block), block.mask, scaling)
        out[:, block.queries] = part.transpose(1, 2)  # (1, heads, q, value size) -> (1, q, heads, value size)
    return out, None


def _columns(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    return tensor[:, :, block.keys] if isinstance(block.keys, slice) else tensor.index_select(2, block.keys)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """(1, heads, q, value size). The heads that share a key become more queries of it: no key is copied."""
    heads, q = query.shape[1:3]
    groups = heads // key.shape[1]
    query = query.reshape(1, key.shape[1], groups * q, query.shape[-1])
    if query.dtype is torch.bfloat16 and cpu_has_bfloat16():
        out = _attend_bfloat16(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    else:
        mask = mask.repeat(1, 1, groups, 1) if groups > 1 else mask
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(1, heads, q, value.shape[-1])


def _attend_bfloat16(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention as two products with exponentials between them: half the time of torch's kernel on blocks of this size.

    A product in bfloat16 is summed in float32 and rounded once. Scores are rounded after a large one of their row is
    taken away, which changes no softmax: so those that have weight are small, and lose little. The weights of a row
    are divided by their sum at the end, in float32.

    Args:
        query: (1, key heads, groups * q, size)
        key: (1, key heads, keys, size)
        value: (1, key heads, keys, value size)
        mask: (1, 1, q, keys) additive.
        scaling: of the scores.

    Returns:
        (1, key heads, groups * q, value size)
    """
    (kv_heads, rows), (q, keys) = query.shape[1:3], mask.shape[2:]
    out = query.new_empty((kv_heads, rows, value.shape[-1]))
    heads = min(kv_heads, max(1, SCORES // (rows * keys)))
    scratch = _scratch((heads, rows, keys))
    for begin in range(0, kv_heads, heads):
        part = slice(begin, min(begin + heads, kv_heads))
        queries, columns = query[0, part], key[0, part].transpose(1, 2)  # (n, rows, size), (n, size, keys)
        scores = scratch[: part.stop - begin]  # (n, rows, keys)
        some = torch.bmm(queries, columns[..., ::EVERY])
        large = (
            some.float().amax(-1).mul_(-scaling).bfloat16()
        )  # (n, rows); in bfloat16 the maximum takes four times as long
        torch.add(mask[0], large.view(-1, q, 1), out=scores.view(-1, q, keys))
        scores.baddbmm_(queries, columns, alpha=scaling)
        weights = scores.exp_()
        sums = weights.sum(-1, keepdim=True, dtype=torch.float32)  # (n, rows, 1)
        out[part] = torch.bmm(weights, value[0, part]) / sums
    return out[None]


_buffers = threading.local()


def _scratch(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory that a thread keeps: what malloc hands back to the system after each block costs more than the sums."""
    size = math.prod(shape)
    kept: torch.Tensor | None = getattr(_buffers, "scores", None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(mode=False):  # a tensor that is made inside can be written to only inside
            kept = _buffers.scores = torch.empty(size, dtype=torch.bfloat16)
    return kept[:size].view(shape)


@contextmanager
def attending(model: CausalLM, plan: ChunkPlan) -> Iterator[None]:
    """Let the model's layers attend by the plan; its attention setting is back as it was afterwards.

    Nothing changes for a model that does not take its attention from transformers' registry, or uses another than
    `sdpa`.
    """
    if model.config.get_text_config()._attn_implementation != "sdpa" or not takes_registered_attention(model):
        yield
        return
    token = _plan.set(plan)
    try:
        with attending_by(model, NAME, visible_attention):
            yield
    finally:
        _plan.reset(token)


def takes_registered_attention(model: CausalLM) -> bool:
    """Whether a model takes its attention from transformers' registry."""
    ask = getattr(type(model), "_can_set_attn_implementation", None)
    return ask is not None and bool(ask())


@contextmanager
def attending_by(model: CausalLM, name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Register an attention function, and let the model's layers attend by it; its setting is then as it was."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    config = model.config.get_text_config()
    before = config._attn_implementation
    try:
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True, slots=True)
class LastLayer:
    """The parts of a model's last layer that treat every position alike."""

    attention: nn.Module
    position_wise: tuple[nn.Module, ...]
    """Modules that can compute some positions only."""

    @classmethod
    def of(cls, model: CausalLM) -> LastLayer | None:
        """Recognise the usual decoder: a list of layers with `self_attn` and, in each, linear maps and an `mlp`."""
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return None
        if len(layers) != getattr(model.config.get_text_config(), "num_hidden_layers", None):
            return None
        attention, mlp = getattr(layers[-1], "self_attn", None), getattr(layers[-1], "mlp", None)
        if not isinstance(attention, nn.Module):
            return None
        maps = [getattr(attention, name, None) for name in ("q_proj", "o_proj")]
        # Not `isinstance`: a quantised subclass may look at all positions together.
        modules: list[nn.Module] = [part for part in maps if type(part) is nn.Linear]
        if isinstance(mlp, nn.Module) and _is_plain_mlp(mlp):
            modules.append(mlp)
        return cls(attention, tuple(modules))

    @contextmanager
    def reading(self, rows: torch.Tensor | None, n: int) -> Iterator[None]:
        """Compute the position-wise modules at `rows` of `n` positions only; their outputs are zero elsewhere."""
        with ExitStack() as hooks:
            if rows is not None:
                for module in self.position_wise:
                    hooks.callback(module.register_forward_pre_hook(partial(_pick, rows, n)).remove)
                    hooks.callback(module.register_forward_hook(partial(_put, rows, n)).remove)
            yield


def _is_plain_mlp(mlp: nn.Module) -> bool:
    # Linear maps and activations, none of them nested: no mixture of experts, no convolution.
    def plain(part: nn.Module) -> bool:
        if type(part) is nn.Linear:
            return True
        stateless = not any(True for _ in part.parameters()) and not any(True for _ in part.buffers())
        return stateless and not any(True for _ in part.children())

    parts = list(mlp.children())
    return bool(parts) and not list(mlp.parameters(recurse=False)) and all(plain(part) for part in parts)


def _pick(rows: torch.Tensor, n: int, _: nn.Module, inputs: Inputs) -> Inputs | None:
    """A hook that leaves of a module's input (1, n, size) only `rows`: (1, r, size)."""
    if not inputs or inputs[0].ndim != 3 or inputs[0].shape[:2] != (1, n):
        return None
    return (inputs[0].index_select(1, rows), *inputs[1:])


def _put(rows: torch.Tensor, n: int, _: nn.Module, __: Inputs, output: torch.Tensor) -> torch.Tensor | None:
    """A hook that puts a module's output at `rows` (1, r, size) back among zeros: (1, n, size)."""
    if output.ndim != 3 or output.shape[:2] != (1, len(rows)):
        return None
    return output.new_zeros((1, n, output.shape[-1])).index_copy_(1, rows, output)
