"""Continues a batch of prompts behind one header, token by token; a row that has ended leaves the batch.

The loop in place of transformers' `generate` for models that take their attention from its registry (`hf_rows.py`).
It differs in what it does not repeat: the header is read once, a prompt with several completions is read once, keys are
never copied from step to step, and logits are computed at the last token alone.

Rows are aligned at their right end: a new token stands in the same column of every row, and a shorter row leaves its
first columns empty. Positions, windows and masks follow the row's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from almost_eval.engines.hf_attention import additive
from almost_eval.engines.hf_loglikelihood import AttentionWindow, padded_left
from almost_eval.engines.hf_rows import HeaderLayers, RowCache, Sight, attending
from almost_eval.engines.hf_sampling import TokenDraw

if TYPE_CHECKING:
    from almost_eval.models.loading import CausalLM

PASS = 2048
"""Tokens of prompts that are read in one pass, empty columns included; one row at least."""

_LEAVE = 8
"""Rows that have ended are dropped once they are one in this many: each time, the keys of the others are copied."""


@dataclass(frozen=True, slots=True)
class Header:
    """What all rows of a batch begin with."""

    layers: HeaderLayers
    """Its keys and values in each layer; empty where nothing is shared."""
    length: int
    """Tokens."""


class Rows:
    """Some rows behind one header, and the model (which passes `refusal`) that they are handed to.

    Args:
        lengths: (B,) tokens that each row has behind the header before the first one is drawn.
        columns: tokens of a row behind the header, those to come included.
    """

    def __init__(
        self, model: CausalLM, header: Header, window: AttentionWindow, lengths: torch.Tensor, columns: int
    ) -> None:
        self._model = model
        self._length = header.length
        self._window = window
        self._width = int(lengths.max())
        self._first = self._width - lengths  # (B,) first column that is not empty
        self._filled = 0
        self.cache = RowCache(header.layers, header.length, columns)

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
        self.cache.place(part.cache, into, len(self._first), self._filled)

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
        return additive(seen, self._model.dtype)[:, None]


def continue_rows(
    model: CausalLM,
    header: Header,
    prompts: Sequence[NDArray[np.int32]],
    sampler: TokenDraw,
    has_ended: Callable[[list[int]], bool],
    max_new_tokens: int,
    window: AttentionWindow,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (row, the tokens that follow its prompt) when it has ended, the token that ended it included.

    The model passes `hf_rows.refusal`. Prompts are longer than the header; equal ones are read once. `has_ended` says
    by the tokens of a completion so far whether it is over.

    Raises:
        ForeignAttention: the model attends in a way that is not computed here.
    """
    rows, logits = _read(model, header, prompts, max_new_tokens, window)
    completions: list[list[int]] = [[] for _ in prompts]
    held = list(range(len(prompts)))  # the row of each line of the batch
    running = list(range(len(held)))  # the lines that have not ended
    while True:
        ended: set[int] = set()
        lines = logits if len(running) == len(held) else logits[running]
        drawn = sampler.draw(lines, [held[line] for line in running])
        for line, token in zip(running, drawn, strict=True):
            completions[held[line]].append(token)
            if len(completions[held[line]]) == max_new_tokens or has_ended(completions[held[line]]):
                yield held[line], completions[held[line]]
                ended.add(line)
        running = [line for line in running if line not in ended]
        if not running:
            return
        if len(held) - len(running) >= max(1, len(held) // _LEAVE):
            rows.keep(torch.tensor(running, device=model.device))
            held, running = [held[line] for line in running], list(range(len(running)))
        last = [completions[row][-1] for row in held]
        logits = rows.forward(torch.tensor(last, device=model.device)[:, None])


def _read(
    model: CausalLM, header: Header, prompts: Sequence[NDArray[np.int32]], new_tokens: int, window: AttentionWindow
) -> tuple[Rows, torch.Tensor]:
    """Rows that have read what their prompts hold behind the header, and the logits (B, V) after it."""
    number: dict[bytes, int] = {}
    row_to_text = [number.setdefault(prompt.tobytes(), len(number)) for prompt in prompts]
    texts = [prompts[row_to_text.index(i)][header.length :] for i in range(len(number))]
    lengths = torch.tensor([len(texts[i]) for i in row_to_text], device=model.device)
    rows = Rows(model, header, window, lengths, int(lengths.max()) + new_tokens)
    logits: torch.Tensor | None = None
    for chosen in _passes([len(text) for text in texts]):
        ids, _ = padded_left([texts[i] for i in chosen], 0)
        sizes = torch.tensor([len(texts[i]) for i in chosen], device=model.device)
        part = Rows(model, header, window, sizes, ids.shape[1])
        after = part.forward(ids.to(model.device))  # (chosen, V)
        into = [row for row, i in enumerate(row_to_text) if i in set(chosen)]
        lines = torch.tensor([chosen.index(row_to_text[row]) for row in into], device=model.device)
        part.keep(lines)
        rows.place(part, torch.tensor(into, device=model.device))
        if logits is None:
            logits = after.new_empty((len(prompts), after.shape[-1]))
        logits[into] = after[lines]
    assert logits is not None
    return rows, logits


def _passes(lengths: Sequence[int]) -> list[list[int]]:
    """Divide texts of these lengths into passes, the longest first, so that neighbours in length are together."""
    passes: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= PASS:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes
