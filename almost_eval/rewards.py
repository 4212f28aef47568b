"""Reward models: one raw number for one conversation, and right answers whatever a batch is padded with.

A reward model here is what ALMoST (arXiv 2305.13735, section 3.1), TRL and vLLM mean by it: a transformers
sequence-classification checkpoint with one label, read at the last token. Rewards are raw logits: no sigmoid.

Departures from a transformers pipeline: the weights are refused before they are read where the score head is not among
them; nothing is cut to fit; each distinct text is computed once; and the pad token is chosen for each batch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from almost_eval.chat import ChatTemplate, encode_text, load_template, special_tokens
from almost_eval.checkpoint import Checkpoint, context_length, find_checkpoint
from almost_eval.engines.hf import ATTENTION, DTYPES, load_tokenizer, load_weights, pick_device, pick_dtype
from almost_eval.errors import InputError, ModelError, RunError, did_you_mean
from almost_eval.types import Conversation

TokenIds = tuple[int, ...]

_HEAD = re.compile(r"(?:^|\.)(?:score|classifier|v_head|classification_head|logits_proj|sequence_summary)\.")
"""A tensor of a score head, under the names that transformers' architectures and published reward models give it."""


@runtime_checkable
class RewardModel(Protocol):
    """Says how good the last answer of a conversation is."""

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw logits, in order; higher is better, and only differences mean something."""
        ...


class HFRewardModel:
    """A transformers sequence classifier with one label. Config and tokenizer load at once, weights on first use.

    Args:
        model: a checkpoint directory, hub id, built-in name, or a `Checkpoint` already found.
        template: how a conversation is written; None is the tokenizer's own template, else ALMoST's dialogue format,
            whose last answer ends with EOS as the official reward model reads it.
        dtype: `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        attention: transformers' attention implementation; `auto` is sdpa where the model has it, else eager.
        batch_size: conversations in a forward pass, or None for as many as `batch_tokens` allows.
        batch_tokens: token positions in a forward pass, or None for 1,024 on a CPU and 16,384 elsewhere. Halved on
            out-of-memory errors.
        max_length: a context length below the model's own.
        allow_pickle: accept pickled weights.
        trust_remote_code: run Python code that the checkpoint ships.

    Raises:
        InputError: an unknown dtype, device or attention.
        ModelError: see `find_checkpoint`; or more than one label, or no score head in the checkpoint.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        template: ChatTemplate | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "auto",
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        for value, known, flag in ((dtype, DTYPES, "dtype"), (attention, ATTENTION, "attention")):
            if value not in known:
                raise InputError(f"unknown {flag} {value!r}; {did_you_mean(value, known)}")
        kinds = ("SequenceClassification", "RewardModel")
        self.checkpoint = (
            model
            if isinstance(model, Checkpoint)
            else find_checkpoint(model, allow_pickle=allow_pickle, architectures=kinds)
        )
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.warnings: list[str] = []
        """What the last `stream` did that its caller should show."""
        self._dtype = dtype
        self._device = device
        self._attention = attention
        self._trust_remote_code = trust_remote_code
        _refuse_wrong_head(self.checkpoint, custom=trust_remote_code and "auto_map" in self.checkpoint.config)
        self.tokenizer = load_tokenizer(self.checkpoint, trust_remote_code=trust_remote_code)
        chosen = template or load_template("auto", self.tokenizer)
        assert chosen is not None  # only `none` is
        self.template: ChatTemplate = chosen
        self.framed = _is_framed(self.tokenizer)
        """Whether the tokenizer puts a text between markers of its own, as encoders' do: `[CLS] ... [SEP]`."""
        own = context_length(self.checkpoint.config, self.tokenizer)
        if self.framed:
            # RoBERTa counts positions from its pad id + 1: of its 514 positions, 512 are usable, and only the
            # tokenizer says so.
            own = min(own, self.tokenizer.model_max_length)
        if max_length is not None and max_length > own:
            raise InputError(f"--max-length {max_length} is beyond the model's own context of {own} tokens")
        self.context_length: int = max_length or own
        """Tokens the model can attend to."""

    @cached_property
    def device(self) -> str:
        """The device that `auto` stands for here."""
        return pick_device(self._device)

    @cached_property
    def dtype(self) -> str:
        """The dtype that `auto` stands for here."""
        return pick_dtype(self._dtype, self.checkpoint, self.device)

    @cached_property
    def model(self) -> Any:
        """The model in eval mode, its weights on the device.

        Raises:
            ModelError: a weight that the model needs is not in the checkpoint.
        """
        import torch
        from transformers import AutoModelForSequenceClassification

        return load_weights(
            AutoModelForSequenceClassification,
            self.checkpoint,
            dtype=getattr(torch, self.dtype),
            device=self.device,
            attention=self._attention,
            trust_remote_code=self._trust_remote_code,
        )

    # --- text ---

    def settings(self) -> dict[str, Any]:
        """What belongs in a run's spec; see `HFEngine.settings`."""
        return {
            "name": "hf",
            "dtype": self.dtype,
            "device": self.device,
            "attention": self._attention,
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "context_length": self.context_length,
        }

    def render(self, conversation: Conversation) -> str:
        """What the model reads, special tokens that the template writes included."""
        # An encoder's tokenizer adds its markers, EOS among them, around the text: the template must not add them too.
        tokens = {} if self.framed else special_tokens(self.tokenizer)
        return self.template.render(conversation, special_tokens=tokens)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of every conversation, whole however long. Loads no weights."""
        texts = [self.render(conversation) for conversation in conversations]
        if self.framed:
            return [list(self.tokenizer.encode(text)) for text in texts]
        return [encode_text(self.tokenizer, text) for text in texts]

    def lengths(self, conversations: Sequence[Conversation]) -> list[int]:
        """Tokens of every conversation: `score` refuses those beyond `context_length`, so look first."""
        return [len(ids) for ids in self.encode(conversations)]

    # --- rewards ---

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw logits, in order; a reward that is not finite is returned as it is.

        Raises:
            InputError: a conversation longer than the context, or empty; nothing is cut.
        """
        rewards = dict(self.stream(conversations))
        return [rewards[i] for i in range(len(conversations))]

    def stream(
        self, conversations: Sequence[Conversation], wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each wanted conversation as soon as its batch is done, longest first.

        The batches depend on all `conversations` and never on `wanted`: a resumed run computes the same ones, without
        those that hold nothing wanted, so it ends in the same bits as an uninterrupted one.

        Raises:
            InputError: see `score`; raised before any weight is loaded.
        """
        from almost_eval.engines.hf_loglikelihood import out_of_memory

        # 1. Distinct texts, longest first: similar lengths share a batch, and memory runs out at the start or never.
        rows = [tuple(ids) for ids in self.encode(conversations)]
        self._refuse_lengths(rows)
        self.warnings = []
        wanted = frozenset(range(len(rows)) if wanted is None else wanted)
        if not wanted:
            return
        owners: dict[TokenIds, list[int]] = {}
        for index, ids in enumerate(rows):
            owners.setdefault(ids, []).append(index)
        texts = sorted(owners, key=lambda ids: (-len(ids), ids))

        # 2. What one forward pass may hold.
        tokens = self.batch_tokens or (1024 if self.device == "cpu" else 16384)
        # Fewer rows than the vocabulary has ids, so that some id is the last token of none: see `_pad_id`.
        rows_at_most = min(self.batch_size or self._vocabulary, self._vocabulary - 1)
        if not self.padding_is_exact:
            rows_at_most = 1
            self.warnings.append("padding changes this model's rewards: each text is computed on its own")

        # 3. Batch by batch.
        at = 0
        while at < len(texts):
            count = max(1, min(tokens // len(texts[at]), rows_at_most))
            batch = texts[at : at + count]
            if any(index in wanted for ids in batch for index in owners[ids]):
                try:
                    rewards = self._forward(batch)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    if len(batch) == 1:
                        raise RunError(
                            f"not enough memory on {self.device} for one text of {len(batch[0])} tokens; use a smaller "
                            "dtype, another device, or a lower --max-length"
                        ) from None
                    tokens = len(batch) // 2 * len(batch[0])
                    self.warnings.append(f"out of memory: went on with {tokens} tokens in a batch")
                    continue
                for ids, reward in zip(batch, rewards, strict=True):
                    yield from ((index, reward) for index in owners[ids] if index in wanted)
            at += len(batch)

    def _refuse_lengths(self, rows: Sequence[TokenIds]) -> None:
        too_long = [index for index, ids in enumerate(rows) if len(ids) > self.context_length]
        if too_long:
            raise InputError(
                f"{len(too_long)} of {len(rows)} conversations do not fit the context of {self.context_length} tokens, "
                f"first number {too_long[0]} with {len(rows[too_long[0]])}; leave them out, or use a model with a "
                "longer context"
            )
        empty = next((index for index, ids in enumerate(rows) if not ids), None)
        if empty is not None:
            raise InputError(f"conversation number {empty} is empty: the chat template gave no token for it")

    @property
    def _vocabulary(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "vocab_size", len(self.tokenizer)))

    @cached_property
    def padding_is_exact(self) -> bool:
        """Whether texts of several lengths may share a batch, measured on this checkpoint with random texts.

        They may not where a model ignores the attention mask (FNet), reads the last position of the batch (XLNet), or
        refuses such a batch (T5). Four short rows show it: a wrong position is off by as much as two texts differ.
        """
        import numpy as np

        rng = np.random.default_rng(0)
        lengths = sorted({min(length, self.context_length) for length in (3, 7, 16, 24)})
        known = min(len(self.tokenizer), self._vocabulary)
        texts = [tuple(rng.integers(0, known, length).tolist()) for length in lengths]
        try:
            alone = np.array([self._forward([ids])[0] for ids in texts])
            together = np.array(self._forward(texts))
        except (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError):
            return False  # architectures refuse padded batches in many ways; all mean the same
        full = self.dtype == "float32"
        spread, size = float(np.ptp(alone)), float(np.abs(alone).max())
        tolerance = 0.02 * spread + 1e-5 * size if full else max(0.25 * spread, 0.02 * size)
        return bool(np.abs(together - alone).max() <= tolerance)  # False for NaN

    def _forward(self, batch: Sequence[TokenIds]) -> list[float]:
        """Rewards of one batch, right-padded."""
        import torch

        longest = max(len(ids) for ids in batch)
        own = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        pad = _pad_id(batch, own, self._vocabulary)
        input_ids = torch.full((len(batch), longest), pad, dtype=torch.long)  # (B, T)
        attention_mask = torch.zeros((len(batch), longest), dtype=torch.long)  # (B, T) 1 on real tokens
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        device = self.model.device
        with torch.inference_mode(), _padding_with(self.model.config, pad):
            logits = self.model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
        if logits.numel() != len(batch):
            raise ModelError(
                f"{self.checkpoint.path} gives {logits.numel() // len(batch)} numbers for a text; a reward model gives "
                "one"
            )
        return logits.float().flatten().tolist()


def _pad_id(batch: Sequence[TokenIds], own: int | None, vocabulary: int) -> int:
    """The token to pad this batch with: the model's own pad token, unless a text of the batch holds it.

    transformers' decoders take a row's reward at its last token that is not `config.pad_token_id`; they do not look at
    the attention mask. Where pad and EOS are one token, which is common, a text that ends in EOS is thus read one token
    too early. So a pad token must not occur in the texts. Which other id stands in for it makes no difference: no
    real token attends to what follows it or is masked. The model's own pad comes first all the same, because encoders
    were trained with it and RoBERTa's position ids are counted from it.
    """
    used = {token for ids in batch for token in ids}
    last = {ids[-1] for ids in batch}
    # The texts of a large batch can use up a tiny vocabulary: not being the last token of any is then enough.
    if own is not None and 0 <= own < vocabulary and own not in used:
        return own
    return next(token for taken in (used, last) for token in range(vocabulary) if token not in taken)


@contextmanager
def _padding_with(config: Any, pad: int) -> Iterator[None]:
    """Sets `pad_token_id` where transformers reads it: on the config, or on the part of it that is about text."""
    configs = [config, config.get_text_config()]
    own = [getattr(part, "pad_token_id", None) for part in configs]
    try:
        for part in configs:
            part.pad_token_id = pad
        yield
    finally:
        for part, value in zip(configs, own, strict=True):
            part.pad_token_id = value


def _refuse_wrong_head(checkpoint: Checkpoint, *, custom: bool) -> None:
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


def _is_framed(tokenizer: Any) -> bool:
    separator = tokenizer.special_tokens_map.get("sep_token")
    return separator is not None and list(tokenizer.encode("a"))[-1:] == [tokenizer.sep_token_id]
