"""The models that PPO trains, in one process: made, taken up from a checkpoint, saved."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from almost_train.common.lora import adapter_off, add_lora, base_dtype, quantization
from almost_train.common.processes import check_together, from_main, join_processes, main_alone, wait_for_all
from almost_train.common.sealed import damage, undamaged
from almost_train.rlsf import checkpoint as checkpoints
from almost_train.rlsf.job import Job, save_policy
from almost_train.rlsf.models import load_policy, load_value_model
from almost_train.rlsf.ppo import Moments
from almost_train.rlsf.rollouts import completion_logprobs
from almost_train.rlsf.sharding import WEIGHTS, spread

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class State:
    """What changes from step to step, beside the weights."""

    step: int
    kl_coefficient: float
    moments: Moments
    """Of the raw rewards, for `normalise_rewards`."""


class PPOModels:
    """Policy, value model and reference of one process."""

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self.job, self.settings = job, settings
        join_processes(settings.device)
        if settings.device.startswith("cuda:"):
            torch.cuda.set_device(settings.device)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if settings.bf16 else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop's own business
        )
        check_together(self.accelerator)
        self.spread = spread(self.accelerator, settings.weight_decay, settings.max_grad_norm)
        device = str(self.accelerator.device)
        held = base_dtype(settings, bf16=settings.bf16)
        bits = quantization(settings)
        self._first = False
        """Whether the policy to be saved is the one that training began with."""
        policy = self._first_policy(device, bits)
        value, self.value_origin = load_value_model(job.reward, job.policy, job.tokenizer, device, bits)
        # The policy that training begins with: the base of an adapter, or a copy.
        self.reference: nn.Module | None = None
        if settings.lora_rank:
            value.trunk = add_lora(
                value.trunk if bits else nn.Module.to(value.trunk, held),
                settings,
                job.policy.path,
                kind="FEATURE_EXTRACTION",
                seed=settings.seed + 1,
            )
        else:
            self.reference = self.spread.freeze(load_policy(job.policy, device))
        if settings.gradient_checkpointing:
            for model in (policy, value.trunk):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trained_policy = self.spread.train("policy", policy, settings.learning_rate)
        rate = settings.value_learning_rate or settings.learning_rate
        self.trained_value = self.spread.train("value", value, rate)
        self.models = (self.trained_policy, self.trained_value)
        self.policy, self.value = self.trained_policy.model, self.trained_value.model
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes

    def reference_logprobs(self, ids: Tensor, attention: Tensor, width: int) -> Tensor:
        """(B, T) log p of the policy that training began with, nats."""
        temperature = self.settings.temperature
        if self.reference is not None:
            return completion_logprobs(self.reference, ids, attention, width, temperature)
        with adapter_off(self.trained_policy.plain):
            return completion_logprobs(self.policy, ids, attention, width, temperature)

    # --- checkpoints ---

    def save(self, state: State) -> None:
        """A checkpoint of this moment; older ones that no guard would go back to are removed."""
        tensors = {trained.name: self.spread.tensors(trained) for trained in self.models}
        if self.job.is_first:
            oldest_wanted = state.step - self.settings.guard_window
            checkpoints.save(self.job.work, state.step, tensors, asdict(state), oldest_wanted)

    def resume(self) -> State | None:
        """The newest whole checkpoint's state, with its weights loaded; None where there is none.

        Raises:
            RunError: all are damaged.
        """
        earlier = main_alone(lambda: undamaged(checkpoints.folders(self.job.work), self.job.progress.notice))
        if not earlier:
            return None
        folder = earlier[-1]
        for trained in self.models:
            self.spread.put(trained, checkpoints.load(folder, trained.name))
        numbers = checkpoints.load_numbers(folder)
        return State(numbers["step"], numbers["kl_coefficient"], Moments(**numbers["moments"]))

    def go_back(self, step: int) -> int:
        """Load the policy of the newest checkpoint up to `step`, else the one training began with; returns its step."""
        whole = from_main([(at, folder) for at, folder in checkpoints.stored(self.job.work) if not damage(folder)])
        good = [(at, folder) for at, folder in whole if at <= step]
        self._first = not good
        if good:
            self.spread.put(self.trained_policy, checkpoints.load(good[-1][1], "policy", weights_alone=True))
            return good[-1][0]
        return 0

    def save_policy(self, step: int | None = None) -> None:
        """Write the policy, whole: see `job.save_policy`."""
        if self._first:
            policy = self._first_policy("cpu") if self.job.is_first else None
        elif self.spread.sharded:
            policy = self._gathered_policy()
        else:
            policy = self.trained_policy.plain
            if step is not None and self.settings.bf16:  # saving converts it
                policy = copy.deepcopy(policy)
        if self.job.is_first:
            assert policy is not None
            save_policy(self.job, policy, step)
        wait_for_all()

    @torch.no_grad()
    def _gathered_policy(self) -> PreTrainedModel | None:
        """The policy whole on the CPU of the main process; None in the others."""
        tensors = self.spread.tensors(self.trained_policy)
        if not self.job.is_first:
            return None
        policy = self._first_policy("cpu")
        for name, parameter in policy.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name][WEIGHTS])
        return policy

    def _first_policy(self, device: str, bits: BitsAndBytesConfig | None = None) -> PreTrainedModel:
        """The policy that training begins with, with its adapter where it has one."""
        settings, base = self.settings, self.job.policy
        policy = load_policy(base, device, base_dtype(settings, bf16=settings.bf16), bits)
        if settings.lora_rank:
            return cast("PreTrainedModel", add_lora(policy, settings, base.path, kind="CAUSAL_LM", seed=settings.seed))
        return policy
