"""Reads the tokens that all prompts of a batch begin with once, and lets every row go on from them.

Few-shot prompts share a header that is most of their length. Its keys and values are computed for one row. Where the
rows can attend to them together (`hf_rows.py`) they stay the only copy. Elsewhere each row of `generate` gets a copy.
That batch is padded on the left as ever: the copy of a row that is padded by `gap` is moved by `gap`, so its tokens
stay side by side and windows, masks and distances are those of the plain path. The keys are kept between the batches of
a call: a batch computes only what follows the part that it shares with the one before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
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
_PASS = 2048
"""Tokens of a header in one forward pass."""


class SharedHeader:
    """The header of the batches of one call.

    Args:
        model: a transformers causal LM.
        longest: tokens of the longest prompt with its completion.
    """

    def __init__(self, model: CausalLM, longest: int) -> None:
        self._model = model
        self._ids: NDArray[np.int32] = np.empty(0, np.int32)
        self._cache: Cache = None
        self.reason = refusal(model, longest)
        """Why headers are not shared, or None."""
        self.tokens_computed = 0
        """Positions of headers that were computed."""

    def rows(self, prompts: Sequence[NDArray[np.int32]]) -> Cache | None:
        """The keys and values of what the prompts share, a row for each, or None where each is read by itself.

        The cache holds the first columns of the batch padded on the left to its longest prompt.
        """
        longest = max(len(prompt) for prompt in prompts)
        shared = min(common_prefix_length(prompts[0], prompt) for prompt in prompts)
        shared = min(shared, len(prompts[0]) - 1, longest - 1)  # a token is left to go on from
        if shared < LEAST or (len(prompts) == 1 and not self._ids.size) or not self._is_read(prompts[0][:shared]):
            return None
        return self._copies([longest - len(prompt) for prompt in prompts])

    def layers(self, ids: NDArray[np.int32]) -> HeaderLayers | None:
        """The keys and values of a header, one copy for all rows, or None where headers are not shared."""
        if not self._is_read(ids):
            return None
        return [(layer.keys, layer.values) for layer in self._cache.layers]

    def _is_read(self, ids: NDArray[np.int32]) -> bool:
        """Whether the kept header now is `ids`; if not, `reason` says why."""
        if self.reason:
            return False
        try:
            self._read(ids)
        except Exception as error:  # models refuse a cache that is not their own in many ways
            self._ids, self._cache = self._ids[:0], None
            if out_of_memory(error):
                raise
            self.reason = f"the model takes no cache of plain keys and values ({type(error).__name__})"
        return not self.reason

    def _read(self, ids: NDArray[np.int32]) -> None:
        """Compute what the kept header lacks of `ids`."""
        from transformers import DynamicCache

        kept = common_prefix_length(self._ids, ids)
        if self._cache is None or not kept:
            kept, self._cache = 0, DynamicCache()  # without the config: the mask does the windowing
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]
        for begin in range(kept, len(ids), _PASS):
            part = torch.from_numpy(ids[begin : begin + _PASS].astype(np.int64)).to(self._model.device)[None]
            self._model(
                input_ids=part,
                position_ids=torch.arange(begin, begin + part.shape[1], device=part.device)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.tokens_computed += len(ids) - kept
        self._ids = ids
        if not _is_plain(self._cache, len(ids)):
            self.reason = "the model keeps more than keys and values of every token"

    def _copies(self, gaps: Sequence[int]) -> Cache:
        """(B, heads, T, size) of each layer: the header moved right by the padding of each row."""
        from transformers import DynamicCache

        copies = DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            moved = []
            for old in (layer.keys, layer.values):
                new = old.new_zeros((len(gaps), *old.shape[1:]))
                for row, gap in enumerate(gaps):
                    if gap < old.shape[-2]:
                        new[row, :, gap:] = old[0, :, : old.shape[-2] - gap]
                moved.append(new)
            copies.update(*moved, number)
        return copies


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
        if keys is None or keys.ndim != 4 or keys.shape[-2] != length:
            return False
    return bool(cache.layers)
