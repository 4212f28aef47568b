"""Reward models of transformers: one raw number for one conversation, which does not depend on the padding.

A reward model here is what ALMoST (arXiv 2305.13735, section 3.1), TRL and vLLM mean by it: a transformers
sequence-classification checkpoint with one label, read at the last token. Rewards are raw logits: no sigmoid.

Departures from a transformers pipeline: the weights are refused before they are read where the score head is not among
them; nothing is cut to fit; each distinct text is computed once; and the pad token is chosen for each batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Unpack

from almost_eval.engines.partition import Partition, partition_units
from almost_eval.errors import InputError, ModelError, RunError, did_you_mean
from almost_eval.models.chat import ChatTemplate
from almost_eval.models.checkpoint import Checkpoint
from almost_eval.models.held import HeldOptions
from almost_eval.models.loading import ATTENTION, load_weights, settled_attention
from almost_eval.rewards.base import CheckpointRewardModel, TokenIds
from almost_eval.rewards.batches import first_samples, pass_count, passes, text_blocks
from almost_eval.types import Conversation, JSONObject

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class HFRewardModel(CheckpointRewardModel):
    """A transformers sequence classifier with one label. Config and tokenizer load at once, weights on first use.

    Args:
        model: a checkpoint directory, hub id, built-in name, or an open `Checkpoint`.
        template: how a conversation is written, or a choice of `load_template`; None is the tokenizer's own template,
            else ALMoST's dialogue format, whose last answer ends with EOS as the official reward model reads it.
        attention: see `HFEngine`.
        batch_size: conversations in a forward pass, or None for as many as `batch_tokens` allows.
        batch_tokens: token positions in a forward pass, or None for 1,024 on a CPU and 16,384 elsewhere. Halved on
            out-of-memory errors.
        max_length: a context length below the model's own.
        held: see `HeldOptions`.

    Raises:
        InputError: an unknown dtype, device or attention.
        ModelError: see `find_checkpoint`; or more than one label, or no score head in the checkpoint.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        template: ChatTemplate | str | None = None,
        attention: str = "auto",
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        **held: Unpack[HeldOptions],
    ) -> None:
        super().__init__(model, template=template, max_length=max_length, **held)
        if attention not in ATTENTION:
            raise InputError(f"unknown attention {attention!r}; {did_you_mean(attention, ATTENTION)}")
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self._attention = settled_attention(attention, self.checkpoint, trust_remote_code=self._trust_remote_code)

    @cached_property
    def model(self) -> PreTrainedModel:
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
            allow_unused=self._allow_unused_weights,
        )

    def settings(self) -> JSONObject:
        """What belongs in a run's spec; see `HFEngine.settings`."""
        return {
            "name": "hf",
            "dtype": self.dtype,
            "device": self.device,
            "attention": self._attention,
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "context_length": self.context_length,
            **self.identity(),
        }

    def partition(
        self, conversations: Sequence[Conversation], sample_of: Sequence[int] | None, n_samples: int, parts: int
    ) -> Partition:
        """See `CheckpointRewardModel.partition`: cut where the passes of `stream` are cut."""
        owners = self.distinct(conversations)
        texts, lengths = list(owners.values()), list(map(len, owners))
        sample = range(len(conversations)) if sample_of is None else sample_of
        first = sample_of and first_samples([sample_of[at] for at in mine] for mine in texts)
        rows = self.batch_size or max(1, len(texts))
        sizes: list[int] = []
        needs: list[set[int]] = [set() for _ in range(n_samples)]
        blocks: list[list[int]] = []
        placed: set[int] = set()
        for block in text_blocks(lengths, first, self._pass_tokens):
            blocks.append([])
            for batch in passes(lengths, block, self._pass_tokens, rows):
                for mine in dict.fromkeys(sample[at] for text in batch for at in texts[text]):
                    needs[mine].add(len(sizes))
                    if mine not in placed:
                        placed.add(mine)
                        blocks[-1].append(mine)
                sizes.append(len(batch) * lengths[batch[0]])
        blocks.append([mine for mine in range(n_samples) if mine not in placed])
        return partition_units(sizes, [frozenset(units) for units in needs], [b for b in blocks if b], parts)

    @property
    def _pass_tokens(self) -> int:
        return self.batch_tokens or (1024 if self.device == "cpu" else 16384)

    def stream(
        self,
        conversations: Sequence[Conversation],
        wanted: Collection[int] | None = None,
        sample_of: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each wanted conversation as soon as its batch is done, longest first.

        The batches depend on all `conversations` and never on `wanted`: a resumed run computes the same ones, without
        those that hold nothing wanted, so it ends in the same bits as an uninterrupted one. Conversations of one
        sample are in neighbouring batches: see `rewards.batches`.

        Raises:
            InputError: see `distinct`; raised before any weight is loaded.
        """
        from almost_eval.engines.hf_loglikelihood import out_of_memory

        # 1. Distinct texts, longest first: similar lengths share a batch, and memory runs out at the start or never.
        owners = self.distinct(conversations)
        self.warnings = self.notes
        wanted = frozenset(range(len(conversations)) if wanted is None else wanted)
        if not wanted:
            return

        # 2. What one forward pass may hold.
        tokens = self._pass_tokens
        # Fewer rows than the vocabulary has ids, so that some id is the last token of none: see `_pad_id`.
        rows_at_most = min(self.batch_size or self._vocabulary, self._vocabulary - 1)
        if not self.padding_is_exact:
            rows_at_most = 1
            self.warnings.append("padding changes this model's rewards: each text is computed on its own")

        # 3. Batch by batch.
        texts = list(owners)
        first = sample_of and first_samples([sample_of[at] for at in mine] for mine in owners.values())
        for block in text_blocks(list(map(len, texts)), first, tokens):
            at = 0
            while at < len(block):
                count = pass_count(len(texts[block[at]]), tokens, rows_at_most)
                batch = [texts[text] for text in block[at : at + count]]
                if any(index in wanted for ids in batch for index in owners[ids]):
                    try:
                        rewards = self._forward(batch)
                    except RuntimeError as error:
                        if not out_of_memory(error):
                            raise
                        if len(batch) == 1:
                            raise RunError(
                                f"not enough memory on {self.device} for one text of {len(batch[0])} tokens; use a "
                                "smaller dtype, another device, or a lower --max-length"
                            ) from None
                        tokens = len(batch) // 2 * len(batch[0])
                        self.warnings.append(f"out of memory: went on with {tokens} tokens in a batch")
                        continue
                    for ids, reward in zip(batch, rewards, strict=True):
                        yield from ((index, reward) for index in owners[ids] if index in wanted)
                at += len(batch)

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
def _padding_with(config: PretrainedConfig, pad: int) -> Iterator[None]:
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
