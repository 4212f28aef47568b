"""Rows that go on from one shared header: its keys are kept and read once for all of them.

A step of 16 rows behind a header of 1,500 tokens would read, and in transformers copy, the header's keys 16 times. Here
the rows are queries of one copy of it. Each row has columns of its own behind the header, set aside beforehand, so that
no step copies what the steps before it left. One softmax goes over both parts, so the numbers are those of attention
over the whole row, up to the order of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from almost_eval.engines.hf_attention import attending_by, identity, takes_registered_attention

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
        """Set the columns of as many rows aside.

        Zeros, for a row's empty columns are read, with weight 0, and what is merely set aside may hold NaN.
        """
        self._keys, self._values = (
            states.new_zeros((*states.shape[:2], self._columns, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new columns (B, key heads, q, size); returns views of all that are filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self._filled = self._filled, self._filled + key_states.shape[-2]
        self._keys[:, :, begin : self._filled] = key_states
        self._values[:, :, begin : self._filled] = value_states
        return self._show()

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = self._keys[:, :, : self._filled], self._values[:, :, : self._filled]
        return self.keys, self.values

    def keep(self, rows: torch.Tensor) -> None:
        """Leave only these rows, in this order."""
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
        self._show()

    def place(self, part: RowLayer, into: torch.Tensor, rows: int, end: int) -> None:
        """Copy the columns of `part` to the rows `into` of `rows`, so that they end before column `end`."""
        keys, values = part._show()
        if not self.is_initialized:
            self.lazy_initialization(keys[:1].expand(rows, -1, -1, -1), values[:1].expand(rows, -1, -1, -1))
        self._keys[into, :, end - keys.shape[-2] : end] = keys
        self._values[into, :, end - values.shape[-2] : end] = values
        self._filled = end
        self._show()

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
        self._rows: list[RowLayer] = []
        super().__init__(layers=self._rows)  # type: ignore[arg-type]
        self.header = header
        self._length = length
        self._columns = columns
        self._number_of: dict[int, int] = {}

    def layer(self, number: int) -> RowLayer:
        """A layer, made where it is not there yet."""
        while len(self._rows) <= number:
            self._rows.append(RowLayer(self._columns))
        return self._rows[number]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowLayer.update`."""
        keys, values = self.layer(layer_idx).update(key_states, value_states)
        self._number_of[keys.data_ptr()] = layer_idx
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a row so far, header and empty columns included."""
        return self._length + (self._rows[layer_idx].get_seq_length() if layer_idx < len(self._rows) else 0)

    def keep(self, rows: torch.Tensor) -> None:
        """Leave only these rows in every layer."""
        self._number_of.clear()
        for layer in self._rows:
            layer.keep(rows)

    def place(self, part: RowCache, into: torch.Tensor, rows: int, end: int) -> None:
        """See `RowLayer.place`."""
        for number, layer in enumerate(part._rows):
            self.layer(number).place(layer, into, rows, end)

    def number_of(self, keys: torch.Tensor) -> int:
        """The layer that returned these very keys.

        Raises:
            ForeignAttention: none did; the model has changed them, or they are of another cache.
        """
        number = self._number_of.get(keys.data_ptr())
        if number is None or identity(self._rows[number].keys) != identity(keys):
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


def refusal(model: CausalLM) -> str | None:
    """Why a model's attention cannot be computed here, as far as its settings say so."""
    implementation = model.config.get_text_config()._attn_implementation
    if implementation != "sdpa":
        return f"attention {implementation!r}"
    return None if takes_registered_attention(model) else "the model computes attention by itself"


_pass: ContextVar[tuple[RowCache, Mapping[str, Sight]] | None] = ContextVar("rows that are computed", default=None)


@contextmanager
def attending(model: CausalLM, cache: RowCache, sights: Mapping[str, Sight]) -> Iterator[None]:
    """Let the layers of a model that passes `refusal` attend by `attend`; its setting is back as it was afterwards."""
    token = _pass.set((cache, sights))
    try:
        with attending_by(model, NAME, attend):
            yield
    finally:
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
    sight = next((s for s in sights.values() if identity(s.own) == identity(attention_mask)), None)
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
    of_header = both[..., :length].reshape(n, rows * group * q, length) @ values  # (n, B * group * q, value size)
    of_own = both[..., length:].transpose(0, 1) @ value.float()  # (B, n, group * q, value size)
    return (of_own + of_header.view(n, rows, group * q, -1).transpose(0, 1)).reshape(rows, heads, q, -1)
