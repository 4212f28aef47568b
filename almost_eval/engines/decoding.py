"""Token ids as text, with the special tokens that mark a thought and without all others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from almost_eval.models.reasoning import marker_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens, but for those that mark a thought: skipped, it would read as answer."""
    own = marks(tokenizer)
    if own.keys().isdisjoint(ids):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    pieces: list[str] = []
    for is_mark, run in itertools.groupby(ids, key=own.__contains__):
        part = list(run)
        pieces += [own[i] for i in part] if is_mark else [str(tokenizer.decode(part, skip_special_tokens=True))]
    return "".join(pieces)


@lru_cache(maxsize=4)
def marks(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> token of the special tokens that mark a thought."""
    # Not `all_special_tokens`, which are those that a config names: `tokenizer.json` alone may mark one as special.
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {special[token]: token for token in marker_tokens(special)}
