"""The models that reinforcement learning trains: the policy, and a value model made of the reward model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.models.loading import attention_arguments, load_weights
from almost_eval.rewards.hf import HFRewardModel
from almost_train.common.lora import without_dropout
from almost_train.common.processes import alone
from almost_train.common.seeding import seeded
from almost_train.rlsf.rollouts import known_options, positions

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_policy(
    checkpoint: Checkpoint,
    device: str,
    dtype: torch.dtype = torch.float32,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """A causal LM without dropout: old and new log-probabilities must differ by the update alone."""
    return _still(AutoModelForCausalLM, checkpoint, device, dtype, quantization)


def _still(
    kind: Any, checkpoint: Checkpoint, device: str, dtype: torch.dtype, bits: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """A model without dropout, by one of transformers' auto classes."""
    options: dict[str, Any] = {"attention": "auto", "trust_remote_code": False, "quantization": bits}
    return without_dropout(load_weights(kind, checkpoint, dtype=dtype, device=device, **options))


def load_saved(folder: Path) -> PreTrainedModel:
    """A policy as a trainer saved it, by a process that knows of no other."""
    with alone():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **attention_arguments(find_checkpoint(str(folder)))
        )


class ValueHead(nn.Linear):
    """A linear layer that computes in float32, also where its weights are gathered in bfloat16."""

    def forward(self, states: Tensor) -> Tensor:
        """(..., 1) of states (..., H)."""
        return nn.functional.linear(states.float(), self.weight.float(), self.bias.float())


class ValueModel(nn.Module):
    """A transformer without a language-modelling head, and a linear head that reads a value at every position."""

    def __init__(self, trunk: nn.Module, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.trunk = cast("PreTrainedModel", trunk)
        size = self.trunk.config.get_text_config().hidden_size if weight is None else weight.shape[1]
        # Not initialised: that would draw from the global generator.
        self.head = nn.utils.skip_init(ValueHead, size, 1, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            self.head.weight.zero_() if weight is None else self.head.weight.copy_(weight)
            self.head.bias.zero_() if bias is None else self.head.bias.copy_(bias)
        self.head.to(self.trunk.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) value of the text up to and with each position."""
        options = known_options(self.trunk, position_ids=positions(attention_mask), use_cache=False)
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round values to 1 in 256
            return self.head(states).squeeze(-1).clone()  # FSDP warns of a view


def rescaled(value_model: Mapping[str, Mapping[str, Tensor]], mean: float, std: float) -> dict[str, dict[str, Tensor]]:
    """The head of a value model that says (value - mean) / std: one of the reward model's then predicts normalised
    rewards. `value_model` are its tensors as in a checkpoint; empty, as they are in all processes but one, gives empty.
    """
    if not value_model:
        return {}
    weight, bias = (value_model[f"head.{name}"]["weights"] for name in ("weight", "bias"))
    return {"head.weight": {"weights": weight / std}, "head.bias": {"weights": (bias - mean) / std}}


def completion_values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, tokens: int) -> Tensor:
    """V(s) (B, tokens) before each of the last `tokens` of each row."""
    return model(input_ids, attention_mask)[:, -tokens - 1 : -1]


def load_value_model(
    reward: HFRewardModel,
    policy: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    quantization: BitsAndBytesConfig | None = None,
) -> tuple[ValueModel, str]:
    """A value model on a trunk of its own, and where it comes from.

    It is the reward model with its score head read at every position, if the reward model reads the policy's tokens
    and reads them from left to right. Else it is the policy's trunk with a head of zeros. Tokens that were added to
    one of the two tokenizers alone (a pad token) do not matter; those without a row in the reward model get zeros.
    With `quantization` the trunk is read anew from the checkpoint, in so few bits.
    """
    reason = _why_not_reward_model(reward, tokenizer)
    if reason is None:
        if quantization is None:
            model = without_dropout(copy.deepcopy(reward.model).float().to(device))
        else:
            kind = AutoModelForSequenceClassification
            model = _still(kind, reward.checkpoint, device, torch.bfloat16, quantization)
        _add_rows(model, len(tokenizer))
        head = _head(model)
        assert head is not None  # or there were a reason
        return ValueModel(model.base_model, head.weight, head.bias), "reward model"
    held = torch.float32 if quantization is None else torch.bfloat16
    trunk = load_policy(policy, device, held, quantization).base_model
    return ValueModel(trunk), f"policy, head at zero: {reason}"


def _head(model: PreTrainedModel) -> nn.Linear | None:
    return next((h for name in ("score", "classifier") if isinstance(h := getattr(model, name, None), nn.Linear)), None)


def shared_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids of the tokens that both have, ascending; None where one has another id in the other, or where they differ in
    more than tokens that were added to either.
    """
    first, second = one.get_vocab(), other.get_vocab()
    only = (first.keys() - second.keys() - one.get_added_vocab().keys()) | (
        second.keys() - first.keys() - other.get_added_vocab().keys()
    )
    both = first.keys() & second.keys()
    if only or any(first[token] != second[token] for token in both):
        return None
    return sorted(first[token] for token in both)


@torch.no_grad()
def _add_rows(model: PreTrainedModel, tokens: int) -> None:
    """At least `tokens` rows of embeddings, new ones of zeros."""
    rows = _embedding(model).num_embeddings
    if rows >= tokens:
        return
    with seeded(0):  # transformers draws the new rows
        model.resize_token_embeddings(tokens, mean_resizing=False)
    _embedding(model).weight[rows:] = 0.0


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast("nn.Embedding", model.get_input_embeddings())


@torch.no_grad()
def _why_not_reward_model(reward: HFRewardModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    known = shared_ids(reward.tokenizer, tokenizer)
    if known is None:
        return "the reward model has another tokenizer"
    model = reward.model
    head = _head(model)
    if head is None or model.base_model is model:
        return "the reward model's head is not one linear layer"
    # Measured, not guessed from a name: the head on the trunk gives the reward, and no position sees a later one.
    # The row has no pad token, so that transformers reads the reward at its last position.
    rows = _embedding(model).num_embeddings
    known = [i for i in known if i != model.config.get_text_config().pad_token_id and i < rows]
    ids = torch.tensor([np.random.default_rng(0).choice(known, 12).tolist()], device=model.device)
    changed = ids.clone()
    changed[0, -1] = next(i for i in known if i != int(ids[0, -1]))
    ones = torch.ones_like(ids)
    probe = ValueModel(model.base_model, head.weight, head.bias)
    before, after = probe(ids, ones)[0], probe(changed, ones)[0]  # (12,)
    reward_at_end = float(model(input_ids=ids, attention_mask=ones).logits.float().flatten()[0])
    tolerance = (1e-4 if reward.dtype == "float32" else 0.05) * (1 + float(before.abs().max()))
    if float((before[:-1] - after[:-1]).abs().max()) > tolerance:
        return "the reward model reads in both directions"
    if abs(reward_at_end - float(before[-1])) > tolerance:
        return "the reward model's head reads something else than its last hidden state"
    return None
