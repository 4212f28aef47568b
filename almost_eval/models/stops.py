"""Where an answer ends: the stop strings of the built-in chat templates, and the tokens that end a text.

The built-in templates are the lines of `templates/stop_strings.json`: a name, and the strings at which an answer in
that format is over, besides EOS, as a model may open the next turn itself. The template is `templates/NAME.jinja`. So a
new template is one file and one line.

Two rules follow from them, each stated once. In-process evaluation ends an answer at `ChatTemplate.stop`: a template of
the tokenizer's own has the token that it writes after an answer, where the checkpoint's EOS is another one. A server
ends a chat at `chat.stop_strings`: there the tokenizer's template has those of the built-in format that it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FOLDER = Path(__file__).with_name("templates")

STOP_STRINGS: dict[str, tuple[str, ...]] = {
    name: tuple(stop) for name, stop in json.loads((_FOLDER / "stop_strings.json").read_text(encoding="utf-8")).items()
}
"""Name of a built-in template -> the strings that end an answer."""


def template_file(name: str) -> Path:
    """The Jinja file of a built-in template."""
    return _FOLDER / f"{name}.jinja"


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string of a text begins; None where it holds none."""
    return min((at for string in stop if (at := text.find(string)) >= 0), default=None)


def end_ids(
    stated: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
) -> frozenset[int]:
    """Ids of the tokens that end a completion.

    Args:
        stated: `eos_token_id` of the model's generation settings.
        tokenizer: its EOS ends a completion too.
        stop: stop strings. One that is a special token never shows in the decoded text, so it ends by its id.
    """
    ids = [*(stated if isinstance(stated, Sequence) else [stated]), tokenizer.eos_token_id]
    # Not all special tokens have a name in the config; the decoder leaves them out all the same.
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    ids += [tokenizer.convert_tokens_to_ids(text) for text in stop if text in special]
    # An id beyond the vocabulary, as some configs hold, is never written, and no embedding has it.
    return frozenset(int(i) for i in ids if i is not None and 0 <= int(i) < len(tokenizer))
