"""What every reward model shares: which checkpoints are one, and what it reads of a conversation.

Whoever computes the rewards (transformers, vLLM, a server) gets the same token ids, so the rewards are equal.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Unpack, runtime_checkable

from almost_eval.engines.partition import Partition, partition_lengths
from almost_eval.errors import InputError, ModelError
from almost_eval.models.chat import ChatTemplate, encode_text, load_template, special_tokens
from almost_eval.models.checkpoint import Checkpoint, context_length
from almost_eval.models.held import HeldCheckpoint, HeldOptions, shorter_context
from almost_eval.models.tokenizers import Opening
from almost_eval.types import Conversation, JSONObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = tuple[int, ...]

ARCHITECTURES = ("SequenceClassification", "RewardModel")
"""Parts of the class name that the config of a reward model holds."""

_HEAD = re.compile(r"(?:^|\.)(?:score|classifier|v_head|classification_head|logits_proj|sequence_summary)\.")
"""A tensor of a score head, under the names that transformers' architectures and published reward models give it."""


@runtime_checkable
class RewardModel(Protocol):
    """Says how good the last answer of a conversation is."""

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw logits, in order; higher is better, and only differences mean something."""
        ...


class StreamedRewards(ABC):
    """A `RewardModel` that gives each reward as soon as it is known."""

    @abstractmethod
    def stream(
        self,
        conversations: Sequence[Conversation],
        wanted: Collection[int] | None = None,
        sample_of: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each wanted conversation as soon as it is known.

        Args:
            conversations: of the whole run, however few are wanted.
            wanted: indices; None is all.
            sample_of: the sample that each conversation belongs to, where those of a sample are wanted together. A
                model may form its batches by it; a process that computes some samples then computes little else.
        """

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw logits, in order; raises as `stream` does."""
        rewards = dict(self.stream(conversations))
        return [rewards[i] for i in range(len(conversations))]


class CheckpointRewardModel(HeldCheckpoint, StreamedRewards):
    """A reward model in this process; a subclass computes the rewards. Arguments: see `HFRewardModel`.

    Raises:
        InputError: an unknown dtype, or a `max_length` beyond the model's own.
        ModelError: see `find_checkpoint`; or more than one label, or no score head in the checkpoint.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        template: ChatTemplate | str | None,
        max_length: int | None,
        **held: Unpack[HeldOptions],
    ) -> None:
        super().__init__(model, architectures=ARCHITECTURES, **held)
        self.warnings: list[str] = []
        """What the last `stream` did that its caller should show."""
        refuse_wrong_head(self.checkpoint, custom=self._trust_remote_code and "auto_map" in self.checkpoint.config)
        self.check_tensors("AutoModelForSequenceClassification")
        self.warnings += self.notes
        chosen = template if isinstance(template, ChatTemplate) else load_template(template or "auto", self.tokenizer)
        assert chosen is not None  # only `none` is
        self.template: ChatTemplate = chosen
        self.framed = is_framed(self.tokenizer)
        """Whether the tokenizer puts a text between markers of its own, as encoders' do: `[CLS] ... [SEP]`."""
        own = context_length(self.checkpoint.config, self.tokenizer)
        if self.framed:
            # RoBERTa counts positions from its pad id + 1: of its 514 positions, 512 are usable, and only the
            # tokenizer says so.
            own = min(own, self.tokenizer.model_max_length)
        self.context_length: int = shorter_context(own, max_length)
        """Tokens the model can attend to."""

    # --- text ---

    def render(self, conversation: Conversation) -> str:
        """What the model reads, special tokens that the template writes included."""
        # An encoder's tokenizer adds its markers, EOS among them, around the text: the template must not add them too.
        tokens = {} if self.framed else special_tokens(self.tokenizer)
        return self.template.render(conversation, special_tokens=tokens)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of every conversation, whole however long. Loads no weights.

        Raises:
            TemplateError: the template writes the special tokens in front twice, or once where the tokenizer does too.
        """
        texts = [self.render(conversation) for conversation in conversations]
        if self.framed:
            opening = Opening.of(self.tokenizer)
            for text in texts:
                opening.refuse_twice(opening.text + text)
            return [list(self.tokenizer.encode(text)) for text in texts]
        return [encode_text(self.tokenizer, text) for text in texts]

    def lengths(self, conversations: Sequence[Conversation]) -> list[int]:
        """Tokens of every conversation: `score` refuses those beyond `context_length`, so look first."""
        return [len(ids) for ids in self.encode(conversations)]

    # --- rewards ---

    @abstractmethod
    def settings(self) -> JSONObject:
        """What belongs in a run's spec; see `HFEngine.settings`."""

    def partition(
        self, conversations: Sequence[Conversation], sample_of: Sequence[int] | None, n_samples: int, parts: int
    ) -> Partition:
        """Divide samples among processes, balanced by what `stream` computes for them. Loads no weights.

        Args:
            conversations: see `stream`.
            sample_of: see `stream`; None makes each conversation a sample.
            n_samples: of the run; those without a conversation cost nothing.
            parts: processes, 1 or more.
        """
        tokens = [0] * n_samples
        lengths = self.lengths(conversations)
        for sample, length in zip(range(len(lengths)) if sample_of is None else sample_of, lengths, strict=True):
            tokens[sample] += length
        return partition_lengths(tokens, parts)

    def distinct(self, conversations: Sequence[Conversation]) -> dict[TokenIds, list[int]]:
        """Every distinct text -> the conversations that are it, longest first.

        Raises:
            InputError: a conversation longer than the context, or empty.
        """
        rows = [tuple(ids) for ids in self.encode(conversations)]
        if too_long := [index for index, ids in enumerate(rows) if len(ids) > self.context_length]:
            raise InputError(
                f"{len(too_long)} of {len(rows)} conversations do not fit the context of {self.context_length} tokens, "
                f"first number {too_long[0]} with {len(rows[too_long[0]])}; leave them out, or use a model with a "
                "longer context"
            )
        if () in rows:
            raise InputError(f"conversation number {rows.index(())} is empty: the chat template gave no token for it")
        owners: dict[TokenIds, list[int]] = {}
        for index, ids in enumerate(rows):
            owners.setdefault(ids, []).append(index)
        return {ids: owners[ids] for ids in sorted(owners, key=lambda ids: (-len(ids), ids))}


def refuse_wrong_head(checkpoint: Checkpoint, *, custom: bool) -> None:
    """Raise ModelError where the checkpoint cannot give one trained number for a text; reads headers alone.

    Args:
        checkpoint: the model; its pickled weights are not opened.
        custom: its own code runs, which may name its head and its labels as it likes.
    """
    config = checkpoint.config
    stated = config.get("num_labels") or len(config.get("id2label") or ())
    labels = stated or (1 if custom else 2)  # transformers leaves out the labels of a config that has two
    if labels != 1:
        raise ModelError(
            f"{checkpoint.path} is a classifier with {labels} labels, not a reward model, which has one; give a "
            "checkpoint trained with num_labels=1"
        )
    names = checkpoint.tensor_names()
    if names and not custom and not any(_HEAD.search(name) for name in names):
        raise ModelError(
            f"{checkpoint.path} has no score head (no score.*, classifier.* or v_head.* among its {len(names)} "
            "tensors); transformers would set it at random, so its rewards would mean nothing: give a trained reward "
            "model"
        )


def is_framed(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer sets a text between marks of its own (`[CLS] ... [SEP]`), as those of encoders do."""
    separator = tokenizer.special_tokens_map.get("sep_token")
    return separator is not None and list(tokenizer.encode("a"))[-1:] == [tokenizer.sep_token_id]
