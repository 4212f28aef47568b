"""A checkpoint that an engine or a reward model holds: its tokenizer, its context, and how its weights are loaded."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

from almost_eval.errors import InputError, did_you_mean
from almost_eval.models.checkpoint import CAUSAL, Checkpoint, find_checkpoint
from almost_eval.models.loading import DTYPES, Purpose, load_tokenizer, pick_device, pick_dtype, say_bfloat16


class HeldCheckpoint:
    """A checkpoint with its tokenizer. Loads no weights.

    Args:
        model: a checkpoint directory, hub id, built-in name, or an open `Checkpoint`.
        dtype: one of `DTYPES`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        allow_pickle: accept pickled weights.
        trust_remote_code: run Python code that the checkpoint ships.
        purpose: what it is held for, which `auto` minds; see `pick_dtype`.
        architectures: see `find_checkpoint`.

    Raises:
        InputError: an unknown dtype.
        ModelError: see `find_checkpoint`.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        dtype: str,
        device: str = "auto",
        allow_pickle: bool,
        trust_remote_code: bool,
        purpose: Purpose = "score",
        architectures: Collection[str] = CAUSAL,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}; {did_you_mean(dtype, DTYPES)}")
        if not isinstance(model, Checkpoint):
            model = find_checkpoint(model, allow_pickle=allow_pickle, architectures=architectures)
        self.checkpoint = model
        self._dtype = dtype
        self._device = device
        self._purpose: Purpose = purpose
        self._trust_remote_code = trust_remote_code

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, of transformers.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        return load_tokenizer(self.checkpoint, trust_remote_code=self._trust_remote_code)

    @cached_property
    def device(self) -> str:
        """The device that `auto` stands for here."""
        return pick_device(self._device)

    @cached_property
    def dtype(self) -> str:
        """The dtype that `auto` stands for here."""
        dtype = pick_dtype(self._dtype, self.checkpoint, self.device, self._purpose)
        if self._dtype == "auto" and self.device == "cpu" and dtype == "bfloat16":
            say_bfloat16(self.checkpoint.name)
        return dtype


def shorter_context(own: int, max_length: int | None) -> int:
    """The context length to use: the model's own, or the shorter one that `--max-length` states.

    Raises:
        InputError: `max_length` is beyond the model's own.
    """
    if max_length is not None and max_length > own:
        raise InputError(f"--max-length {max_length} is beyond the model's own context of {own} tokens")
    return max_length or own
