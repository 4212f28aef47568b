"""A policy before it is trained: its tokenizer, its weights, where its answers end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from almost_eval.errors import ModelError
from almost_eval.models.checkpoint import Checkpoint
from almost_eval.models.loading import load_tokenizer, load_weights
from almost_eval.models.tensors import check_weights
from almost_train.common.lora import base_dtype, quantization
from almost_train.common.train_settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def policy_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy whose answers end, with a pad token.

    Raises:
        ModelError: it has no EOS token, or the weights do not fit the model.
    """
    tokenizer = load_tokenizer(checkpoint)
    check_weights(checkpoint, "AutoModelForCausalLM")
    if tokenizer.special_tokens_map.get("eos_token") is None:
        raise ModelError(f"the tokenizer of {checkpoint.path} has no EOS token, so no answer could ever end; set it")
    if tokenizer.special_tokens_map.get("pad_token") is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels and masks mark the padding, so EOS itself is still learnt
    return tokenizer


def load_causal_lm(settings: TrainSettings, checkpoint: Checkpoint) -> PreTrainedModel:
    """The weights that training starts from, on the CPU: the trainer puts them where they belong."""
    from transformers import AutoModelForCausalLM

    return load_weights(
        AutoModelForCausalLM,
        checkpoint,
        dtype=base_dtype(settings, bf16=settings.bf16),
        device="cpu",
        attention=settings.attention,
        trust_remote_code=False,
        quantization=quantization(settings),
    )


def stop_at_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make transformers and vLLM end an answer at the tokenizer's EOS too, besides the model's earlier end tokens."""
    own = model.generation_config.eos_token_id
    known = [] if own is None else [own] if isinstance(own, int) else list(own)
    ends = [tokenizer.eos_token_id, *(token for token in known if token != tokenizer.eos_token_id)]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
