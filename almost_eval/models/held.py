"""A checkpoint that an engine or a reward model holds: its tokenizer, its context, and how its weights are loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import Any, TypedDict

from almost_eval.errors import InputError, did_you_mean
from almost_eval.models.checkpoint import CAUSAL, Checkpoint, find_checkpoint
from almost_eval.models.loading import DTYPES, Purpose, load_tokenizer, pick_device, pick_dtype, say_bfloat16
from almost_eval.models.tensors import compare_tensors, names, not_compared, refuse_tensors
from almost_eval.types import JSONObject


class HeldOptions(TypedDict, total=False):
    """What every engine and reward model of this process takes for its checkpoint, and hands on to `HeldCheckpoint`."""

    dtype: str
    """One of `DTYPES`; `auto` is float32 on a CPU and the checkpoint's own elsewhere, but see `pick_dtype`."""
    device: str
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    allow_pickle: bool
    """Accept pickled weights."""
    trust_remote_code: bool
    """Run Python code that the checkpoint ships."""
    purpose: Purpose
    """`generate` where it will only continue prompts: `auto` may then be bfloat16 on a CPU."""
    allow_unused_weights: bool
    """Accept tensors in the files that the model does not take; `notes` then names them."""


class HeldCheckpoint:
    """A checkpoint with its tokenizer. Loads no weights.

    Args:
        model: a checkpoint directory, hub id, built-in name, or an open `Checkpoint`.
        architectures: see `find_checkpoint`.

    All others: see `HeldOptions`.

    Raises:
        InputError: an unknown dtype.
        ModelError: see `find_checkpoint`.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        dtype: str = "auto",
        device: str = "auto",
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        purpose: Purpose = "score",
        allow_unused_weights: bool = False,
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
        self._allow_unused_weights = allow_unused_weights
        self.unused_weights: list[str] = []
        """Tensors in the files that the model does not take, and that were accepted."""
        self._not_compared: str | None = None

    def check_tensors(self, auto_class: str) -> None:
        """`refuse_tensors` for weights that `auto_class` of transformers would load, from headers alone."""
        tensors = compare_tensors(self.checkpoint, auto_class, trust_remote_code=self._trust_remote_code)
        refuse_tensors(self.checkpoint, tensors, allow_unused=self._allow_unused_weights)
        self.unused_weights = list(tensors.unused)
        self._not_compared = tensors.unknown

    @property
    def notes(self) -> list[str]:
        """What is unusual about the weights, for the warnings of a result."""
        unused = self.unused_weights
        notes = [f"{len(unused)} tensors of the checkpoint are not used: {names(unused)}"] if unused else []
        return notes + ([not_compared(self._not_compared)] if self._not_compared else [])

    def identity(self) -> JSONObject:
        """What of the weights belongs in a run's spec besides their digest; empty where nothing is unusual."""
        identity: JSONObject = {"unused_weights": self.unused_weights} if self.unused_weights else {}
        if self.checkpoint.adapter:
            identity["adapter"] = {
                "base": str(self.checkpoint.path),
                "base_digest": replace(self.checkpoint, adapter=None).weight_digest(),
                "adapter_digest": replace(self.checkpoint, weight_files=()).weight_digest(),
            }
        return identity

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
