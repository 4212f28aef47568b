"""How the two models that PPO trains lie on its processes: whole in each, or spread over them by FSDP or by ZeRO-3.

Each model is spread by itself and has its own optimizer, so the arithmetic of the loop is the same everywhere. What
leaves this file (a checkpoint, the saved policy) is whole, whichever way the weights were spread; so a training may go
on with another number of processes, or another way of spreading.

Two models under one Accelerator are more than `Accelerator.prepare` takes with FSDP2 or DeepSpeed: they are prepared by
torch's `fully_shard` and by `deepspeed.initialize`, with what the launcher's configuration says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from almost_train.common.processes import sharding

WEIGHTS = "weights"
"""The name of a parameter's own values, beside those of its optimizer's state: `exp_avg`, ..."""


@dataclass(slots=True)
class Trained:
    """A model in training, on this process."""

    name: str
    plain: Any
    """The model itself; when it is spread, its parameters are shares."""
    model: Any
    """What its forward passes go through."""
    optimizer: torch.optim.Optimizer
    rate: float
    """Peak learning rate."""


class Replicas:
    """Every process holds every model whole; gradients are averaged over the processes, and clipped by model."""

    sharded = False
    """Whether a process holds only a share of a model."""

    def __init__(self, accelerator: Accelerator, weight_decay: float, max_grad_norm: float) -> None:
        self.accelerator = accelerator
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm

    # --- models ---

    def train(self, name: str, model: nn.Module, rate: float) -> Trained:
        """Make a model ready to be trained. What its parameters were is not to be used any more."""
        optimizer = self._optimizer(model, rate)
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        return Trained(name, model, wrapped, prepared.optimizer, rate)

    def freeze(self, model: nn.Module) -> nn.Module:
        """Make ready a model that is not trained."""
        return model.requires_grad_(False)

    def _optimizer(self, model: nn.Module, rate: float) -> torch.optim.AdamW:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.weight_decay:
            return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        # As transformers' Trainer has it: scales of norms and biases are not drawn to zero.
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)

    def whole(self, trained: Trained) -> AbstractContextManager[Any]:
        """Inside, the model is whole in every process, which may run it as often as it likes: to sample."""
        return nullcontext(trained.plain)

    # --- an update ---

    def accumulating(self, trained: Trained, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward pass of a micro-batch: gradients are summed over processes with the last."""
        return nullcontext() if last else self.accelerator.no_sync(trained.model)

    def backward(self, trained: Trained, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; `last` says whether `update` follows."""
        self.accelerator.backward(loss)

    def update(self, trained: Trained, check: Callable[[float], None]) -> None:
        """Take a step with the gradients, and clear them.

        Args:
            trained: the model.
            check: is called with the gradient's norm before the step; raises to keep the weights as they were.
        """
        norm: Any = torch.nn.utils.clip_grad_norm_(trained.plain.parameters(), self.max_grad_norm)
        check(float(self._gathered(norm)))
        trained.optimizer.step()
        trained.optimizer.zero_grad()

    def set_rate(self, trained: Trained, factor: float) -> None:
        """The next step's learning rate, as a share of the peak."""
        for group in trained.optimizer.param_groups:
            group["lr"] = trained.rate * factor

    # --- whole tensors ---

    def tensors(self, trained: Trained, prefix: str = "") -> dict[str, dict[str, Tensor]]:
        """Parameter -> `weights` and each of its optimizer's tensors, whole and on the CPU, in the main process.

        Every process must call it. In the others they are empty. Frozen parameters (of a LoRA's base) are left out, as
        are those whose name does not begin with `prefix`; tied ones are there once.
        """
        main, tensors = self.accelerator.is_main_process, {}
        for name, parameter in trained.plain.named_parameters():
            if parameter.requires_grad and name.startswith(prefix):
                state = {WEIGHTS: parameter.detach(), **trained.optimizer.state.get(parameter, {})}
                gathered = {key: self._gathered(tensor) for key, tensor in state.items()}
                if main:
                    tensors[name] = {key: tensor.cpu().contiguous() for key, tensor in gathered.items()}
        return tensors

    @torch.no_grad()
    def put(self, trained: Trained, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set parameters and optimizer to what `tensors` said, in every process; what it does not name stays.

        Every process must call it with the same.
        """
        for name, parameter in trained.plain.named_parameters():
            for key, tensor in tensors.get(name, {}).items():
                if key == WEIGHTS:
                    parameter.copy_(self._as(tensor, parameter))
                else:
                    state = trained.optimizer.state[parameter]
                    state[key] = tensor if tensor.ndim == 0 else self._as(tensor, parameter).clone()

    def _gathered(self, tensor: Tensor) -> Tensor:
        return tensor

    def _as(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A whole tensor on the parameter's device, spread as it is."""
        return tensor.to(parameter.device)


class FSDP(Replicas):
    """FSDP2: parameters, gradients and optimizer state are shares, gathered layer by layer as they are needed.

    While the policy samples it stays whole in every process (14 GB for 7B parameters in bfloat16): gathering it anew
    for every token would cost more than the token.
    """

    sharded = True

    def train(self, name: str, model: nn.Module, rate: float) -> Trained:
        """Make a model ready to be trained; its optimizer is of the shares."""
        self._shard(model)
        return Trained(name, model, model, self._optimizer(model, rate), rate)

    def freeze(self, model: nn.Module) -> nn.Module:
        """Make ready a model that is not trained."""
        self._shard(model.requires_grad_(False))
        return model

    def _shard(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

        plugin = self.accelerator.state.fsdp_plugin
        bf16 = self.accelerator.mixed_precision == "bf16"
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,)),
            "reshard_after_forward": bool(plugin.reshard_after_forward),
            "offload_policy": plugin.cpu_offload or OffloadPolicy(),
            # Gradients are summed in float32, and the value head's output is not rounded.
            "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy(),
        }
        layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
        for module in list(model.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, **options)
        fully_shard(model, **options)

    @contextmanager
    def whole(self, trained: Trained) -> Iterator[Any]:
        """Inside, the model is whole in every process."""
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in trained.plain.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
        # The first pass gathers every unit, in all processes together; later ones have nothing to gather.
        with torch.no_grad():
            trained.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.accelerator.device))
        try:
            yield trained.plain
        finally:
            keep = not self.accelerator.state.fsdp_plugin.reshard_after_forward
            for unit in units:
                unit.set_reshard_after_forward(not keep, recurse=False)
                unit.reshard()

    def accumulating(self, trained: Trained, *, last: bool) -> AbstractContextManager[object]:
        """Nothing: gradients that waited for the last micro-batch would be whole in every process."""
        return nullcontext()

    def _gathered(self, tensor: Tensor) -> Tensor:
        return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _as(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        spread = cast(Any, parameter)
        return distribute_tensor(tensor.to(spread.device), spread.device_mesh, spread.placements)


class Zero3(Replicas):
    """DeepSpeed's ZeRO stage 3: an engine for each model.

    Its low-precision weights and its float32 ones are two sets of shares, which are kept equal here.
    """

    sharded = True

    def __init__(self, accelerator: Accelerator, weight_decay: float, max_grad_norm: float) -> None:
        super().__init__(accelerator, weight_decay, max_grad_norm)
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # transformers would load each model as shares already; what the value model is made of is read whole here.
        unset_hf_deepspeed_config()
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        # The loop accumulates and counts by itself; DeepSpeed divides by these two.
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        config |= {"train_batch_size": accelerator.num_processes, "gradient_clipping": max_grad_norm}
        config |= {"zero_allow_untested_optimizer": True, "steps_per_print": 10**9}

    def train(self, name: str, model: nn.Module, rate: float) -> Trained:
        """Make a model ready to be trained."""
        import deepspeed

        config = copy.deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        optimizer = self._optimizer(model, rate)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return Trained(name, engine.module, engine, optimizer, rate)

    def freeze(self, model: nn.Module) -> nn.Module:
        """Make ready a model that is not trained."""
        from trl.models.utils import prepare_deepspeed

        frozen: nn.Module = prepare_deepspeed(model.requires_grad_(False), self.accelerator)
        return frozen

    def whole(self, trained: Trained) -> AbstractContextManager[Any]:
        """Inside, the model is whole in every process."""
        from trl.models.utils import unwrap_model_for_generation

        return cast("AbstractContextManager[Any]", unwrap_model_for_generation(trained.model, self.accelerator))

    def accumulating(self, trained: Trained, *, last: bool) -> AbstractContextManager[object]:
        """Nothing: gradients are shares from the first micro-batch on."""
        return nullcontext()

    def backward(self, trained: Trained, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients."""
        trained.model.set_gradient_accumulation_boundary(is_boundary=last)
        trained.model.backward(loss)

    def update(self, trained: Trained, check: Callable[[float], None]) -> None:
        """Take a step. DeepSpeed clips as it steps, and knows the norm only then: `check` comes after it."""
        trained.model.step()
        check(float(trained.model.get_global_grad_norm()))

    def tensors(self, trained: Trained, prefix: str = "") -> dict[str, dict[str, Tensor]]:
        """Parameter -> `weights` and each of its optimizer's tensors; see `Replicas.tensors`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, dict[str, Tensor]] = {}
        steps = [state["step"] for state in trained.optimizer.state.values() if "step" in state]
        for name, parameter in trained.plain.named_parameters():
            if parameter.requires_grad and name.startswith(prefix):
                state = {WEIGHTS: safe_get_full_fp32_param(parameter)}
                if steps:
                    state |= {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
                    state["step"] = steps[0].clone()  # safetensors takes a tensor once
                if self.accelerator.is_main_process:
                    tensors[name] = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
        return tensors

    @torch.no_grad()
    def put(self, trained: Trained, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set parameters and optimizer to what `tensors` said."""
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, parameter in trained.plain.named_parameters():
            for key, tensor in tensors.get(name, {}).items():
                if key == WEIGHTS:
                    safe_set_local_fp32_param(parameter, self._share(tensor, parameter))
                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.copy_(tensor)
                elif key == "step":
                    for state in trained.optimizer.state.values():
                        state["step"] = tensor.clone()
                else:
                    safe_set_local_optimizer_state(parameter, self._share(tensor, parameter), key)

    def _share(self, tensor: Tensor, parameter: Any) -> Tensor:
        """A process's own part of a whole tensor, as long as every other's; what is beyond the end is 0."""
        size = parameter.ds_tensor.numel()
        flat = nn.functional.pad(tensor.flatten().float(), (0, size * self.accelerator.num_processes - tensor.numel()))
        return flat[size * self.accelerator.process_index :][:size].to(self.accelerator.device)


def spread(accelerator: Accelerator, weight_decay: float, max_grad_norm: float) -> Replicas:
    """What the launcher's configuration asks for."""
    kinds = {None: Replicas, "fsdp": FSDP, "deepspeed": Zero3}
    return kinds[sharding()](accelerator, weight_decay, max_grad_norm)
