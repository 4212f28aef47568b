"""What a tokenizer makes of a text: whether it can be trusted with one, and what it puts in front.

It must say what its own files say, lose no text, and know no id that the model has no row for. transformers 5 puts the
pre-tokenizer of the class that `tokenizer_config.json` names in the place of the one that `tokenizer.json` holds: with
the wrong class all spaces vanish, and every number is wrong without a word (huggingface/transformers#45488). An id
beyond the embedding ends in an IndexError, or on a GPU in garbage.

In front of a text stand the special tokens that the tokenizer's post-processor really writes, exactly once. A chat
template may write them itself, and the tokenizer would then write them again. So the whole special prefix is read off
the tokenizer, whatever its config names (`bos_token` may be absent, `add_bos_token` may be ignored by the tokenizer's
class), and a text that begins with it gets no second one. A text that brings it twice is refused: its template is
wrong, and every number would be off. Every path asks here: scoring, generation, rewards, training, and what a server is
told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from almost_eval.errors import ModelError, TemplateError
from almost_eval.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

PROBES = (
    "Answer: hello world 2023",
    "  Two  spaces, a tab\tand\n\nblank lines.\n  - It's 1,234.5% of CamelCase_names; don't (really) [stop]!",
    "def f(x):\n    return x**2  # naïve café, Ünïcödé, 中文字, русский, 🙂",
)
_WORDS = "hello world the quick brown fox reads what is on line three of page 2023".split()
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
CURE = 'set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json'


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse a tokenizer that would feed the model something else than its text. Loads no weights.

    Args:
        tokenizer: as transformers loaded it.
        checkpoint: the model that will read the ids; one without files and config has no rows to compare with.
        folder: where the tokenizer's files are.

    Raises:
        ModelError: ids differ from those of `tokenizer.json`, or of the base of an adapter that leaves its embedding;
            words are lost on the way, or an id has no row.
    """
    try:
        _compare_with_own_file(tokenizer, folder)
        _refuse_lost_words(tokenizer, folder)
        opening = Opening.of(tokenizer)
    except ModelError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise ModelError(
            f"the tokenizer of {folder} cannot encode a plain text as {type(tokenizer).__name__} ({str(error)[:120]}); "
            f"{CURE}, or save the right tokenizer beside the weights"
        ) from None
    if checkpoint.adapter and checkpoint.adapter.embedding_rows is None and folder != checkpoint.path:
        _compare_with_base(tokenizer, checkpoint.path, folder)
    rows = embedding_rows(checkpoint)
    if rows is not None:
        _refuse_ids_without_row(tokenizer, opening, rows, folder)


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding: as the weights have them, else as the config says; None where neither tells."""
    if checkpoint.adapter and checkpoint.adapter.embedding_rows:
        return checkpoint.adapter.embedding_rows
    shapes = [shape for name, shape in checkpoint.tensor_shapes().items() if _EMBEDDING.search(name)]
    if counts := [shape[0] for shape in shapes if len(shape) == 2]:
        return max(counts)
    text = checkpoint.config.get("text_config") or checkpoint.config
    size = text.get("vocab_size")
    return size if isinstance(size, int) else None


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _compare_with_own_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{file} is no tokenizer that can be read ({str(error)[:120]}); save it again") from None
    if share := getattr(own.model, "dropout", None):
        raise ModelError(
            f'{file} has a dropout of {share:g}: it cuts the same text into other tokens each time; set "dropout" to '
            "null"
        )
    own.no_truncation()
    own.no_padding()
    # Whether a text begins with a space of its own is a setting beside the file: then only the rest is compared.
    skipped = 3 if "add_prefix_space" in _tokenizer_config(folder) else 0
    for text in PROBES:
        stored = list(own.encode(text, add_special_tokens=False).ids)
        loaded = _encode(tokenizer, text)
        if stored != loaded and (not skipped or stored[skipped - len(stored) :] != loaded[skipped - len(stored) :]):
            raise ModelError(
                f"the tokenizer of {folder} does not do what its tokenizer.json says: as {type(tokenizer).__name__} it "
                f"makes {len(loaded)} tokens of {text[:24]!r}, which read {tokenizer.decode(loaded)[:24]!r}, the file "
                f"{len(stored)}; {CURE}"
            )


def _compare_with_base(tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """An adapter's own tokenizer may add tokens; one of another model feeds the base other rows."""
    file = base / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    own = tokenizer.get_vocab()
    moved = {
        token: number
        for token, number in Tokenizer.from_file(str(file)).get_vocab().items()
        if own.get(token, number) != number
    }
    if moved:
        token = min(moved)
        raise ModelError(
            f"the tokenizer of the adapter {folder} gives {len(moved)} tokens other ids than that of its base {base}, "
            f"first {token!r} {own[token]} and not {moved[token]}: it is another model's; remove it"
        )


def _tokenizer_config(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_lost_words(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Words and the spaces between them come back; case, punctuation and kinds of blanks may not, by design."""
    # A small vocabulary lacks some words, an encoder's lowers them: what is known alone must be known in a row.
    known = [word for word in _WORDS if str(tokenizer.decode(_encode(tokenizer, word))).strip().lower() == word]
    text = " ".join(known)
    back = str(tokenizer.decode(_encode(tokenizer, text)))
    if back.lower().split() != known:
        raise ModelError(
            f"the tokenizer of {folder} loses text: {text[:40]!r} comes back as {back[:40]!r}; {CURE}, or save the "
            "right tokenizer beside the weights"
        )
    if not known and tokenizer.unk_token_id is None:
        raise ModelError(f"the tokenizer of {folder} loses text: no word of a probe comes back; {CURE}")


def _refuse_ids_without_row(tokenizer: PreTrainedTokenizerBase, opening: Opening, rows: int, folder: Path) -> None:
    if any(number >= rows for number in opening.ids):
        raise ModelError(
            f"the tokenizer of {folder} puts the ids {list(opening.ids)} before a text, and the embedding has {rows} "
            "rows; mend the post_processor in its tokenizer.json"
        )
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    # Entries that no text is ever encoded to do no harm. Padded embeddings, with more rows than tokens, are common.
    written = [token for token, number in sorted(beyond.items()) if number in _encode(tokenizer, token)]
    if written:
        raise ModelError(
            f"the tokenizer of {folder} writes {len(written)} tokens that the model has no row for, first "
            f"{written[0]!r} with the id {beyond[written[0]]} where the embedding has {rows} rows"
            f"{_named_as(tokenizer, written[0], folder)}; take them out of the tokenizer, or add rows with "
            "model.resize_token_embeddings, train them, and save the model"
        )


def _named_as(tokenizer: PreTrainedTokenizerBase, token: str, folder: Path) -> str:
    """Where a token comes from that `tokenizer.json` does not have; empty where it has it."""
    file = folder / "tokenizer.json"
    if not file.is_file() or json.dumps(token)[1:-1] in file.read_text(encoding="utf-8"):
        return ""
    roles = [role for role, name in tokenizer.special_tokens_map.items() if str(name) == token]
    kind = f", as its {roles[0]}" if roles else ""
    return f" (tokenizer.json has no such token: another file adds it, or the class {type(tokenizer).__name__}{kind})"


# --- what stands before a text ---

BOS_LINE = "{{- bos_token -}}\n"
"""Writes a BOS that has a name, in front of a template."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The special tokens that a tokenizer puts before a text."""

    ids: tuple[int, ...]
    """Empty where it puts none."""
    text: str
    """The same as a template would write them."""
    bos: str
    """The BOS token by name; empty where the config names none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Opening:
        """Read off the tokenizer by one letter with and without its special tokens.

        A letter, not "": where BOS and EOS are one token, an empty text cannot tell which of the two was added.
        """
        bare = list(tokenizer.encode("a", add_special_tokens=False))
        whole = list(tokenizer.encode("a"))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        ids = tuple(int(i) for i in whole[:at])
        text = "".join(map(str, tokenizer.convert_ids_to_tokens(list(ids)))) if ids else ""
        # The map holds only what is set; asking for an attribute that is not makes transformers log an error.
        return cls(ids, text, str(tokenizer.special_tokens_map.get("bos_token") or ""))

    def is_written(self, text: str) -> bool:
        """Whether a text brings its own opening: all of the prefix, or the named BOS."""
        # As it is, too: the mark of some tokenizers is white space itself.
        marks = tuple(mark for mark in (self.text, self.bos) if mark)
        return text.startswith(marks) or text.lstrip().startswith(marks)

    def refuse_twice(self, text: str) -> None:
        """Raise TemplateError where a text begins with more BOS tokens than the tokenizer would write."""
        mark = self.bos or self.text
        if not mark.strip():
            return  # none, or one that is white space, of which a text may begin with more
        front = re.match(rf"(?:\s*{re.escape(mark)})*", text)
        count, own = front[0].count(mark) if front else 0, max(1, self.text.count(mark))
        if count > own:
            raise TemplateError(
                f"the prompt begins with {count} BOS tokens, the tokenizer's own encoding with {own}: the "
                f"template writes {mark!r} once too often; mend it, or choose another template"
            )

    def before(self, text: str, ids: Sequence[int]) -> list[int]:
        """The ids of a text, encoded without special tokens, with the opening in front where it has none.

        Raises:
            TemplateError: the text brings it twice.
        """
        self.refuse_twice(text)
        written = self.is_written(text) or (self.ids and tuple(ids[: len(self.ids)]) == self.ids)
        return list(ids) if written else [*self.ids, *ids]

    @property
    def line(self) -> str:
        """Jinja that writes the opening, to stand in front of a template that leaves it to the tokenizer."""
        if not self.ids:
            return ""
        return BOS_LINE if self.text == self.bos else "{{- " + repr(self.text) + " -}}\n"
