"""How TRL's trainers are set up for reward models and policies: their arguments, and what is not as TRL has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from almost_eval.errors import InputError
from almost_eval.models.loading import pick_device
from almost_eval.types import JSONObject
from almost_train.common.processes import WORK, check_processes, join_processes, world_size
from almost_train.common.schedule import OwnSchedule
from almost_train.common.train_settings import TrainSettings, check_hardware


class QuietTrainer(OwnSchedule):
    """Mixed into TRL's trainers: they send usage figures to the hub, and write a model card into every checkpoint.

    And the learning rate is ours.
    """

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """transformers', with tied weights there once also where they were gathered from several processes."""
        tied = getattr(vars(self).get("model"), "all_tied_weights_keys", None) or {}
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def create_model_card(self, *_: object, **__: object) -> None:
        """Writes no card: `stage.json` has the settings and the inputs."""


@contextmanager
def labelled_positions_alone() -> Iterator[None]:
    """Within it TRL projects no position through the LM head that has no label, wherever it computes.

    TRL leaves them out on a GPU, and elsewhere projects all, so that the shapes stay the same for compilers; nothing is
    compiled here. Where prompts are longer than answers and rows are padded, most positions have no label.
    """
    from trl.trainer import utils

    own = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = own


def resume_on_cpu(trainer: Any) -> None:
    """Let each of several processes on CPUs load the optimiser's state of a checkpoint.

    Each is told "cpu:0" by accelerate, where torch.load refuses to put a tensor.
    """
    import torch

    if trainer.args.device.type == "cpu":
        vars(trainer.args)["_setup_devices"] = torch.device("cpu")


def check_batches(settings: TrainSettings) -> int:
    """Items of one forward pass on one device: `micro_batch_size`, or less where the batch has fewer for each.

    Raises:
        InputError: `batch_size` cannot be shared by the processes, several GPUs are seen by one process, or the machine
            cannot follow the settings (`check_hardware`).
    """
    import torch

    check_hardware(settings.device, settings.optim, settings.attention)
    micro, processes = micro_batch(settings), world_size()
    if pick_device(settings.device) == "cuda" and processes == 1 and torch.cuda.device_count() > 1:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; start it with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )
    return micro


def micro_batch(settings: TrainSettings) -> int:
    """The arithmetic of `check_batches`, which needs no machine.

    Raises:
        InputError: `batch_size` cannot be shared by the processes.
    """
    processes = world_size()
    micro = min(settings.micro_batch_size, max(1, settings.batch_size // processes))
    if settings.batch_size % (micro * processes):
        raise InputError(
            f"batch_size {settings.batch_size} is not a multiple of {micro} (micro_batch_size) x {processes} "
            "(processes); change one of them"
        )
    return micro


def joined(device: str) -> JSONObject:
    """Arguments with which transformers' Trainer trains on the device, together with all processes.

    By itself it sets up the processes anew: where it sees no GPU and is not told of the CPU, each one on its own.
    """
    join_processes(device)
    return {"use_cpu": check_processes(device) == "cpu", "accelerator_config": {"use_configured_state": True}}


def trainer_arguments(settings: TrainSettings, folder: Path) -> JSONObject:
    """What `RewardConfig` and `SFTConfig` have in common."""
    micro = check_batches(settings)
    return {
        "output_dir": str(folder / WORK),
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optim,
        "num_train_epochs": 1,  # the plan holds all epochs
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // (micro * world_size()),
        "max_length": None,  # what is too long has been left out and counted
        "remove_unused_columns": False,
        "seed": settings.seed,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the other way needs inputs with gradients
        **joined(settings.device),
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,  # a mean over several steps would depend on where a run was resumed
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 1,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
