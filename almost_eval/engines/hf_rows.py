"""Rows that go on from one shared header: its keys are kept and read once for all of them.

A step of 16 rows behind a header of 1,500 tokens would read, and in transformers copy, the header's keys 16 times. Here
the rows are queries of one copy of it. Each row has columns of its own behind the header, set aside beforehand, so that
no step copies what the steps before it left. One softmax goes over both parts, so the numbers are those of attention
over the whole row, up to the order of the sums.

Rows are aligned at their right end: a new token stands in the same column of every row, and a shorter row leaves its
first columns empty. Positions, windows and masks follow the row's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from almost_eval.engines.hf_loglikelihood import AttentionWindow

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM

NAME = "almost_shared_header"
"""Name of `attend` in transformers' registry."""

HeaderLayers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of the header in each layer, (1, key heads, header, size). Empty where there is no header."""

_SCORES = 1 << 24
"""Attention scores that are computed at a time (64 MiB of float32)."""


class ForeignAttention(Exception):
    """A layer attends in a way that `attend` does not compute; the message says which."""


class RowLayer(CacheLayerMixin):
    """One layer's keys and values of every row behind the header, (B, key heads, columns, size).

    Args:
        columns: how many tokens a row will have behind the header.
    """

    is_sliding = False

    def __init__(self, columns: int) -> None:
        super().__init__()
        self._columns = columns
        self._filled = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Set the columns aside; what is not filled yet is never read."""
        self._keys, self._values = (
            states.new_empty((*states.shape[:2], self._columns, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new columns (B, key heads, q, size); returns views of all that are filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._filled + key_states.shape[-2]
        self._keys[:, :, self._filled : end] = key_states
        self._values[:, :, self._filled : end] = value_states
        self._filled = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def keep(self, rows: torch.Tensor) -> None:
        """Leave only these rows, in this order."""
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
        self.keys, self.values = self._keys[:, :, : self._filled], self._values[:, :, : self._filled]

    def place(self, part: RowLayer, into: torch.Tensor, rows: int, end: int) -> None:
        """Copy the columns of `part` to the rows `into` of `rows`, so that they end before column `end`."""
        if not self.is_initialized:
            # Zeros, for empty columns are read, with weight 0, and what is set aside may hold NaN.
            self._keys, self._values = (
                states.new_zeros((rows, states.shape[1], self._columns, states.shape[-1]))
                for states in (part.keys, part.values)
            )
            self.is_initialized = True
        width = part.keys.shape[-2]
        self._keys[into, :, end - width : end] = part.keys
        self._values[into, :, end - width : end] = part.values
        self._filled = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns after `query_length` more, and where they begin."""
        return self._filled + query_length, 0

    def get_seq_length(self) -> int:
        """Columns that are filled."""
        return self._filled

    def get_max_length(self) -> int:
        """Columns that were set aside."""
        return self._columns


class RowCache(Cache):
    """What transformers' models take as their cache: the rows' own columns. The header is known to `attend` alone."""

    def __init__(self, header: HeaderLayers, length: int, columns: int) -> None:
        super().__init__(layers=[])
        self.header = header
        self._length = length
        self._columns = columns
        self._number_of: dict[int, int] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowLayer.update`."""
        keys, values = self.layer(layer_idx).update(key_states, value_states)
        self._number_of[keys.data_ptr()] = layer_idx
        return keys, values

    def layer(self, number: int) -> RowLayer:
        """A layer, made where it is not there yet."""
        while len(self.layers) <= number:
            self.layers.append(RowLayer(self._columns))
        layer: RowLayer = self.layers[number]
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a row so far, header and empty columns included."""
        return self._length + (self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0)

    def keep(self, rows: torch.Tensor) -> None:
        """Leave only these rows in every layer."""
        self._number_of.clear()
        for layer in self.layers:
            layer.keep(rows)

    def number_of(self, keys: torch.Tensor) -> int:
        """The layer that returned these very keys.

        Raises:
            ForeignAttention: none did; the model has changed them, or they are of another cache.
        """
        number = self._number_of.get(keys.data_ptr())
        if number is None or _identity(self.layers[number].keys) != _identity(keys):
            raise ForeignAttention("a layer attends to other keys than those in its cache")
        return number


@dataclass(frozen=True, slots=True)
class Sight:
    """What the queries of one pass see, for one kind of layer."""

    own: torch.Tensor
    """(B, 1, q, columns) to be added to the scores of the rows' own columns."""
    begin: int
    """Tokens of the header that no query sees: a window has left them behind."""
    header: torch.Tensor | None
    """(B, q, header - begin) to be added to the scores of the header; None where every query sees all of it."""


class Rows:
    """Some rows behind one header, and the model that they are handed to.

    Args:
        model: a causal LM that passes `refusal`.
        header: its keys and values in each layer.
        length: tokens of the header.
        window: how far back the layers look.
        lengths: (B,) tokens that each row will have before the first one is drawn.
        columns: tokens of a row behind the header, those to come included.
    """

    def __init__(
        self,
        model: CausalLM,
        header: HeaderLayers,
        length: int,
        window: AttentionWindow,
        lengths: torch.Tensor,
        columns: int,
    ) -> None:
        self._model = model
        self._length = length
        self._window = window
        self._width = int(lengths.max())
        self._first = self._width - lengths  # (B,) first column that is not empty
        self._filled = 0
        self.cache = RowCache(header, length, columns)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) after the last of these tokens (B, q), which fill the next columns."""
        queries = torch.arange(self._filled, self._filled + ids.shape[1], device=ids.device)  # columns
        self._filled += ids.shape[1]
        places = queries[None] - self._first[:, None]  # (B, q) of a token in its row; below 0 in empty columns
        sights = self._sights(queries, places)
        masks = {kind: sight.own for kind, sight in sights.items()}
        with attending(self._model, self.cache, sights):
            logits: torch.Tensor = self._model(
                input_ids=ids,
                position_ids=(places + self._length).clamp(min=0),
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Leave only these rows, in this order."""
        self._first = self._first.index_select(0, rows)
        self.cache.keep(rows)

    def place(self, part: Rows, into: torch.Tensor) -> None:
        """Make these rows (b,) those of `part`, which have been computed behind the same header."""
        self._filled = self._width
        for number, layer in enumerate(part.cache.layers):
            self.cache.layer(number).place(layer, into, len(self._first), self._filled)

    def _sights(self, queries: torch.Tensor, places: torch.Tensor) -> Mapping[str, Sight]:
        """Kind of layer -> what is seen by queries in these columns (q,), which are at these places of the rows."""
        columns = torch.arange(self._filled, device=queries.device)
        distance = queries[:, None] - columns[None]  # (q, columns)
        is_token = columns[None] >= self._first[:, None]  # (B, columns)
        seen = is_token[:, None] & (distance >= 0)  # (B, q, columns)
        # An empty column sees itself, so that no softmax is over nothing. Nobody reads what comes of it.
        full = Sight(self._additive(seen | (distance == 0)), 0, None)
        if self._window.size is None:
            return {"full_attention": full}
        near = self._additive((seen & (distance < self._window.size)) | (distance == 0))
        begin = min(max(0, self._length + int(places.min()) + 1 - self._window.size), self._length)
        header = None
        if begin < self._length and self._length + int(places.max()) >= self._window.size:
            ahead = self._length - torch.arange(begin, self._length, device=queries.device)  # (header - begin,)
            header = self._additive(places[..., None] + ahead < self._window.size)[:, 0]
        by_kind = {"full_attention": full, "sliding_attention": Sight(near, begin, header)}
        return {kind: by_kind[kind] for kind in self._window.layer_types or ("sliding_attention",)}

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        """(B, 1, q, columns) of (B, q, columns) bool."""
        dtype = self._model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def refusal(model: CausalLM) -> str | None:
    """Why a model's attention cannot be computed here, as far as its settings say so."""
    implementation = model.config.get_text_config()._attn_implementation
    if implementation != "sdpa":
        return f"attention {implementation!r}"
    ask = getattr(type(model), "_can_set_attn_implementation", None)
    if ask is None or not ask():
        return "the model computes attention by itself"
    return None


_pass: ContextVar[tuple[RowCache, Mapping[str, Sight]] | None] = ContextVar("rows that are computed", default=None)


@contextmanager
def attending(model: CausalLM, cache: RowCache, sights: Mapping[str, Sight]) -> Iterator[None]:
    """Let the layers of a model that passes `refusal` attend by `attend`; its setting is back as it was afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.config.get_text_config()
    before = config._attn_implementation
    token = _pass.set((cache, sights))
    try:
        config._attn_implementation = NAME
        yield
    finally:
        config._attn_implementation = before
        _pass.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa` gives for the header and a row's own columns side by side.

    Args:
        module: the attention layer.
        query: (B, heads, q, size)
        key: (B, key heads, columns, size), as the cache returned it.
        value: (B, key heads, columns, value size)
        attention_mask: (B, 1, q, columns), the very tensor that the model got.
        dropout: 0.
        scaling: of the scores, or None for 1 / sqrt(size).
        kwargs: what this model's other attention functions take; `sdpa` looks at `position_bias` alone.

    Returns:
        (B, q, heads, value size), and no weights.

    Raises:
        ForeignAttention: the layer attends in another way.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    present = _pass.get()
    if present is None:
        raise ForeignAttention("a layer attends outside of a pass")
    cache, sights = present
    if dropout or kwargs.get("position_bias") is not None or query.shape[1] % key.shape[1]:
        raise ForeignAttention("a layer attends with dropout, a bias or uneven heads")
    number = cache.number_of(key)
    sight = next((s for s in sights.values() if _identity(s.own) == _identity(attention_mask)), None)
    if sight is None:
        raise ForeignAttention("a layer attends by another mask than that of its pass")
    if not cache.header and query.shape[2] > 1:  # a kernel that keeps no scores
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    header = None
    if cache.header and sight.begin < cache.header[number][0].shape[-2]:
        keys, values = cache.header[number]
        header = keys[0, :, sight.begin :], values[0, :, sight.begin :]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    columns = key.shape[-2] + (header[0].shape[-2] if header else 0)
    step = max(1, _SCORES // (len(query) * query.shape[1] * columns))
    parts = [
        _attend(
            query[:, :, begin : begin + step],
            key,
            value,
            sight.own[:, :, begin : begin + step],
            header,
            None if sight.header is None else sight.header[:, begin : begin + step],
            scale,
        )
        for begin in range(0, query.shape[2], step)
    ]
    return torch.cat(parts, 2).to(query.dtype).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    header: tuple[torch.Tensor, torch.Tensor] | None,
    header_mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """(B, heads, q, value size) in float32, as the kernels for half precision compute it, too."""
    rows, heads, q, size = query.shape
    n = key.shape[1]
    group = heads // n  # heads that share a key: they become more queries of it, and no key is copied
    queries = (query.float() * scale).reshape(rows, n, group * q, size)
    own = queries @ key.float().transpose(-1, -2)  # (B, n, group * q, columns)
    own = (own.view(rows, n, group, q, -1) + mask[:, :, None]).view(rows, n, group * q, -1)
    if header is None:
        return (own.softmax(-1) @ value.float()).reshape(rows, heads, q, -1)
    keys, values = (part.float() for part in header)  # (n, header, size)
    packed = queries.transpose(0, 1).reshape(n, rows * group * q, size)
    shared = packed @ keys.transpose(-1, -2)  # (n, B * group * q, header)
    length = shared.shape[-1]
    if header_mask is not None:
        shared = shared.view(n, rows, group, q, length) + header_mask[None, :, None]
    both = torch.cat([shared.view(n, rows, group * q, length), own.transpose(0, 1)], -1).softmax(-1)
    out = (
        (both[..., :length].reshape(n, rows * group * q, length) @ values).view(n, rows, group * q, -1).transpose(0, 1)
    )
    out = out + both[..., length:].transpose(0, 1) @ value.float()
    return out.reshape(rows, heads, q, -1)


def _identity(tensor: torch.Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    # Not `id`: models may hand their layers a view of what they got.
    return None if tensor is None else (tensor.data_ptr(), tuple(tensor.shape))
