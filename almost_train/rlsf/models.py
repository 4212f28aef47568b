"""The models that reinforcement learning trains: the policy, and a value model made of the reward model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from almost_eval.models.checkpoint import Checkpoint
from almost_eval.models.loading import load_weights
from almost_eval.rewards.hf import HFRewardModel
from almost_train.rlsf.rollouts import known_options, positions


def load_policy(checkpoint: Checkpoint, device: str) -> Any:
    """A float32 causal LM without dropout: old and new log-probabilities must differ by the update alone."""
    model = load_weights(
        AutoModelForCausalLM,
        checkpoint,
        dtype=torch.float32,
        device=device,
        attention="auto",
        trust_remote_code=False,
    )
    return without_dropout(model)


def without_dropout(model: Any) -> Any:
    """The model, every dropout of it at 0, so that training mode computes what evaluation does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "drop_prob" in name):
                setattr(module, name, 0.0)  # applied by functions: attention_dropout
    return model


class ValueModel(nn.Module):
    """A transformer without a language-modelling head, and a linear head that reads a value at every position."""

    def __init__(self, trunk: Any, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        size = trunk.config.get_text_config().hidden_size if weight is None else weight.shape[1]
        # Not initialised: that would draw from the global generator.
        self.head = nn.utils.skip_init(nn.Linear, size, 1, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            self.head.weight.zero_() if weight is None else self.head.weight.copy_(weight)
            self.head.bias.zero_() if bias is None else self.head.bias.copy_(bias)
        self.head.to(trunk.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) value of the text up to and with each position."""
        options = known_options(self.trunk, position_ids=positions(attention_mask), use_cache=False)
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round values to 1 in 256
            return self.head(states.float()).squeeze(-1)

    @torch.no_grad()
    def rescale(self, mean: float, std: float) -> None:
        """From now on say (value - mean) / std: a head of the reward model, made to predict normalised rewards."""
        self.head.weight.div_(std)
        self.head.bias.sub_(mean).div_(std)


def completion_values(model: Any, input_ids: Tensor, attention_mask: Tensor, tokens: int) -> Tensor:
    """V(s) (B, tokens) before each of the last `tokens` of each row."""
    return model(input_ids, attention_mask)[:, -tokens - 1 : -1]


def load_value_model(reward: HFRewardModel, policy: Checkpoint, tokenizer: Any, device: str) -> tuple[ValueModel, str]:
    """A value model on its own trunk, and where it comes from.

    It is the reward model with its score head read at every position, where that has a meaning: it must read the
    policy's tokens, from left to right. Else it is the policy's trunk with a head of zeros.
    """
    reason = _why_not_reward_model(reward, tokenizer)
    if reason is None:
        model = without_dropout(copy.deepcopy(reward.model).float().to(device))
        head = _head(model)
        value = ValueModel(model.base_model, head.weight.detach(), None if head.bias is None else head.bias.detach())
        return value, "reward model"
    trunk = load_policy(policy, device).base_model
    return ValueModel(trunk), f"policy, head at zero: {reason}"


def _head(model: Any) -> Any:
    return next((h for name in ("score", "classifier") if isinstance(h := getattr(model, name, None), nn.Linear)), None)


@torch.no_grad()
def _why_not_reward_model(reward: HFRewardModel, tokenizer: Any) -> str | None:
    if reward.tokenizer.get_vocab() != tokenizer.get_vocab():
        return "the reward model has another tokenizer"
    model = reward.model
    if _head(model) is None or model.base_model is model:
        return "the reward model's head is not one linear layer"
    # Measured, not guessed from a name: the head on the trunk is the reward, and no position sees a later one.
    # A row of its own without the pad token: its last position is the one that transformers reads the reward at.
    known = [i for i in range(len(tokenizer)) if i != model.config.get_text_config().pad_token_id]
    ids = torch.tensor([np.random.default_rng(0).choice(known, 12).tolist()], device=model.device)
    changed = ids.clone()
    changed[0, -1] = next(i for i in known if i != int(ids[0, -1]))
    ones = torch.ones_like(ids)
    head = _head(model)
    probe = ValueModel(model.base_model, head.weight.float(), None if head.bias is None else head.bias.float())
    before, after = probe(ids, ones)[0], probe(changed, ones)[0]  # (12,)
    reward_at_end = float(model(input_ids=ids, attention_mask=ones).logits.float().flatten()[0])
    tolerance = (1e-4 if reward.dtype == "float32" else 0.05) * (1 + float(before.abs().max()))
    if float((before[:-1] - after[:-1]).abs().max()) > tolerance:
        return "the reward model reads in both directions"
    if abs(reward_at_end - float(before[-1])) > tolerance:
        return "the reward model's head reads something else than its last hidden state"
    return None
