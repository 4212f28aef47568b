"""Speculative decoding on vLLM: tokens are guessed ahead, and the model checks several in one pass.

What is written is drawn from the model's own distribution (rejection sampling, arXiv 2302.01318): greedy answers are
the same tokens as without guesses; with the same seed, sampled ones are other draws of that distribution, the same each
time (on a CPU: see `vllm_sampling.expand_rows`). So the method
and the draft model's digest are a part of the spec. Log-likelihoods draw nothing: there is no token to guess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from almost_eval.errors import InputError
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.types import JSONObject

FLAG = "speculative_config"
TOKENS = "num_speculative_tokens"
EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 4}'


@dataclass(frozen=True, slots=True)
class Speculative:
    """How tokens are guessed."""

    config: Mapping[str, Any]
    """For `vllm.LLM`, under vLLM's names; a draft model is a folder."""
    draft: Checkpoint | None = None

    def settings(self) -> JSONObject:
        """What belongs in a run's spec."""
        digest = {"draft_digest": self.draft.weight_digest()} if self.draft else {}
        return {**self.config, **digest}


def read_speculative(value: str | Mapping[str, Any], target: Checkpoint) -> Speculative:
    """What `--speculative-config` says, checked against the model whose tokens are guessed.

    Args:
        value: JSON or a mapping, with the keys of vLLM's `SpeculativeConfig`; further ones are vLLM's to check.
        target: the model.

    Raises:
        InputError: no mapping, no method, no number of tokens, or a draft model of another vocabulary.
        ModelError: no such draft model.
    """
    config = _mapping(value)
    method, draft = config.get("method"), config.get("model")
    if method is None and draft is None:
        raise InputError(f"{FLAG} has no method: ngram, or draft_model with a model; write {EXAMPLE}")
    tokens = config.get(TOKENS)
    needs_tokens = method in (None, "ngram", "draft_model")
    if (tokens is None and needs_tokens) or (tokens is not None and (type(tokens) is not int or tokens < 1)):
        raise InputError(f"{FLAG}: {TOKENS} is {tokens!r}; it must be a number of at least 1")
    if method == "ngram":
        if draft is not None:
            raise InputError(f"{FLAG}: ngram guesses from the text itself, so it takes no model; leave one of them out")
        return Speculative(config)
    if method == "draft_model" and draft is None:
        raise InputError(f"{FLAG}: draft_model needs a model, a small one with the tokens of {target.name}")
    if draft is None:
        return Speculative(config)
    small = find_checkpoint(str(draft))
    if small.adapter:
        raise InputError(f"{FLAG}: {draft} is an adapter; merge it (almost-train merge) to guess with it")
    sizes = [_vocabulary(checkpoint) for checkpoint in (target, small)]
    if method in (None, "draft_model") and sizes[0] != sizes[1] and not config.get("use_heterogeneous_vocab"):
        raise InputError(
            f"{FLAG}: {draft} has {sizes[1]} tokens and {target.name} {sizes[0]}; a draft model has the same ones"
        )
    return Speculative({**config, "model": str(small.path)}, small)


def _mapping(value: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{FLAG} is not JSON ({error}); write {EXAMPLE}") from None
    if not isinstance(value, Mapping):
        raise InputError(f"{FLAG} is not an object; write {EXAMPLE}")
    return dict(value)


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    config = checkpoint.config.get("text_config") or checkpoint.config
    size: int | None = config.get("vocab_size")
    return size
