"""Reads the tokens that all prompts of a batch begin with once, and lets every row go on from them.

Few-shot prompts share a header that is most of their length. Its keys and values are computed for one row. Where the
rows can attend to them together (`hf_rows.py`) they stay the only copy. Elsewhere each row of `generate` gets a copy.
That batch is padded on the left as ever: the copy of a row that is padded by `gap` is moved by `gap`, so its tokens
stay side by side and windows, masks and distances are those of the plain path. An engine keeps the last headers from
call to call: a batch computes only what follows the part that it shares with one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from almost_eval.engines.hf_loglikelihood import length_dependence, out_of_memory
from almost_eval.engines.hf_rows import HeaderLayers
from almost_eval.engines.prefix import common_prefix_length

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM

Cache = Any
"""transformers' `DynamicCache`; its types do not say that its layers have keys and values."""

LEAST = 16
"""Tokens of a header that is worth a pass of its own."""
MOST = 2
"""Headers that are kept: in self-play, that of the user and that of the assistant."""
_PASS = 2048
"""Tokens of a header in one forward pass."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A header that has been read."""

    ids: NDArray[np.int32]
    cache: Cache


class SharedHeader:
    """Reads headers and keeps the last `MOST` of them, between batches and between calls.

    Args:
        model: a transformers causal LM, whose weights stay as they are.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._kept: list[_Kept] = []  # the last one read at the end
        self._failure: str | None = None
        self.reason: str | None = None
        """Why headers are not shared, or None."""

    def prepare(self, longest: int) -> None:
        """Find out whether headers are shared in a call whose longest prompt has so many tokens with its completion."""
        self.reason = self._failure or refusal(self.model, longest)

    def rows(self, prompts: Sequence[NDArray[np.int32]]) -> Cache | None:
        """The keys and values of what the prompts share, a row for each, or None where each is read by itself.

        The cache holds the first columns of the batch padded on the left to its longest prompt.
        """
        longest = max(len(prompt) for prompt in prompts)
        shared = min(common_prefix_length(prompts[0], prompt) for prompt in prompts)
        shared = min(shared, len(prompts[0]) - 1, longest - 1)  # a token is left to go on from
        if shared < LEAST or (len(prompts) == 1 and not self._kept):
            return None
        layers = self.layers(prompts[0][:shared])
        return None if layers is None else _copies(layers, [longest - len(prompt) for prompt in prompts])

    def layers(self, ids: NDArray[np.int32]) -> HeaderLayers | None:
        """The keys and values of a header, one copy for all rows, or None where headers are not shared."""
        if self.reason:
            return None
        try:
            cache = self._read(ids)
        except Exception as error:  # models refuse a cache that is not their own in many ways
            self._kept.clear()
            if out_of_memory(error):
                raise
            self._failure = f"the model takes no cache of plain keys and values ({type(error).__name__})"
        else:
            if _is_plain(cache, len(ids)):
                return [(layer.keys[..., : len(ids), :], layer.values[..., : len(ids), :]) for layer in cache.layers]
            self._failure = "the model keeps more than keys and values of every token"
        self.reason = self._failure
        return None

    def _read(self, ids: NDArray[np.int32]) -> Cache:
        """A cache that begins with `ids`: kept, or computed from where it parts from those that are."""
        from transformers import DynamicCache

        shared = [common_prefix_length(kept.ids, ids) for kept in self._kept]
        best = int(np.argmax(shared)) if shared else 0
        begin = shared[best] if shared else 0
        if begin == len(ids):
            self._kept.append(self._kept.pop(best))
            return self._kept[-1].cache
        cache: Cache = DynamicCache()  # without the config: the mask does the windowing
        if begin:
            kept = self._kept[best]
            for number, layer in enumerate(kept.cache.layers):
                cache.update(layer.keys[..., :begin, :], layer.values[..., :begin, :], number)
            if begin == len(kept.ids):  # the new one holds all of it
                del self._kept[best]
        for start in range(begin, len(ids), _PASS):
            part = torch.from_numpy(ids[start : start + _PASS].astype(np.int64)).to(self.model.device)[None]
            self.model(
                input_ids=part,
                position_ids=torch.arange(start, start + part.shape[1], device=part.device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._kept = [*self._kept, _Kept(ids.copy(), cache)][-MOST:]
        return cache


def _copies(layers: HeaderLayers, gaps: Sequence[int]) -> Cache:
    """(B, heads, T, size) of each layer: the header moved right by the padding of each row."""
    from transformers import DynamicCache

    copies = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        copies.update(_moved(keys, gaps), _moved(values, gaps), number)
    return copies


def _moved(old: torch.Tensor, gaps: Sequence[int]) -> torch.Tensor:
    new = old.new_zeros((len(gaps), *old.shape[1:]))
    for row, gap in enumerate(gaps):
        if gap < old.shape[-2]:
            new[row, :, gap:] = old[0, :, : old.shape[-2] - gap]
    return new


def refusal(model: CausalLM, longest: int) -> str | None:
    """Why a model's headers cannot be shared, as far as its settings say so."""
    if reason := length_dependence(model.config, longest):
        return reason
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "position_ids", "logits_to_keep"} <= parameters.keys():
        return "the model takes no cache of keys and values, or no positions"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if odd := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of kind {', '.join(sorted(odd))}"
    return None


def _is_plain(cache: Cache, length: int) -> bool:
    from transformers.cache_utils import DynamicLayer

    for layer in cache.layers:
        keys = layer.keys if type(layer) is DynamicLayer else None
        if keys is None or keys.ndim != 4 or keys.shape[-2] < length:
            return False
    return bool(cache.layers)
