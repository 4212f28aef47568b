"""One stage in several processes, as `accelerate launch` starts them: the main one writes, the others follow."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from almost_eval.errors import AlmostError, InputError, MissingDependencyError, RunError
from almost_eval.models.chat import ChatTemplate
from almost_eval.models.loading import pick_device
from almost_eval.types import JSONObject
from almost_train.common.card import write_cards
from almost_train.common.lora import ADAPTER
from almost_train.common.stage import WORK, Stage

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup

    class TrainedSettings(DataclassInstance, Protocol):
        """Settings of a stage that trains."""

        @property
        def device(self) -> str:
            """Where it trains."""
            ...


T = TypeVar("T")
_group: tuple[object, ProcessGroup] | None = None
"""The connection that `join_processes` made, and the group over it in which processes wait."""

WAIT = timedelta(days=365)
"""How long a process waits for the others: generation by the main one may take days. One that has died is no reason to
wait for: the launcher ends all processes when one of them ends."""

_SHARDING_NEEDS = {
    "fsdp": (
        ("FSDP_VERSION", "1", "2"),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", "FULL_STATE_DICT"),  # saved models are whole
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false", "false"),  # new weights are drawn from the seed in every process
    ),
    "deepspeed": (
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "3"),
        ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false", "true"),
        ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false", "false"),
    ),
}
"""What the launcher's configuration must say: (its environment variable, what an absent one means, what is needed)."""

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What the launcher tells a process of the others."""


def world_size() -> int:
    """How many processes `accelerate launch` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def sharding() -> str | None:
    """How the launcher's configuration spreads the weights: `fsdp`, `deepspeed`, or None: each process holds all."""
    names = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
    return next((name for key, name in names.items() if os.environ.get(key, "false").lower() == "true"), None)


def check_processes(device: str) -> str:
    """The kind of device that this process trains on: `cpu`, `cuda` or `mps`.

    Raises:
        InputError: the device cannot be used, or the processes could not train together on it.
        MissingDependencyError: DeepSpeed is not installed.
    """
    chosen, processes = pick_device(device), world_size()
    kind = chosen.partition(":")[0]
    if processes > 1 and kind not in ("cpu", "cuda"):
        raise InputError(f"{processes} processes cannot train together on {kind}; launch one, or use --device cpu")
    if processes > 1 and ":" in chosen:
        raise InputError(
            f"--device {chosen} would put all {processes} processes on one GPU; leave it out: each takes its own"
        )
    if kind == "cuda":
        import torch

        here, seen = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > seen:
            raise InputError(f"{here} processes were launched on a machine of {seen} GPUs; set num_processes to {seen}")
    for name, value, needed in _SHARDING_NEEDS.get(sharding() or "", ()):
        if (own := os.environ.get(name, value).lower()) != needed.lower():
            line = name.removeprefix("ACCELERATE_DEEPSPEED_").lower()
            raise InputError(f"the launcher's configuration has {line}: {own}; set {line}: {needed}")
    if sharding() == "deepspeed" and find_spec("deepspeed") is None:
        raise MissingDependencyError("ZeRO-3 needs the package 'deepspeed'; install it with: pip install deepspeed")
    if sharding() and processes == 1:
        raise InputError(
            f"{sharding()} spreads weights over processes, and one was launched; set num_processes to the number of "
            "GPUs, or start the command without accelerate launch"
        )
    return kind


def join_processes(device: str) -> None:
    """Set accelerate up anew for what is trained next: all processes together, on one kind of device.

    Accelerate keeps one state for the whole program. What an earlier stage left in it (a number format, the layers
    that FSDP wraps) must not reach the next one. The processes' connection stays.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    kind = check_processes(device)
    forget_deepspeed()
    AcceleratorState._reset_state(reset_partial_state=True)
    if world_size() == 1:
        PartialState(cpu=kind == "cpu")
        return
    state = PartialState(cpu=kind == "cpu", timeout=WAIT)
    if kind == "cpu" and sharding():
        # Accelerate shards where it sees several accelerators, and on CPUs would train whole copies without a word.
        # What it does then works over gloo too, and is so tested.
        state.distributed_type = DistributedType.MULTI_GPU
        os.environ.pop("ACCELERATE_USE_CPU", None)  # it forbids DeepSpeed; the device is settled already
        if sharding() == "deepspeed":
            from deepspeed import comm

            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    if state.num_processes != world_size():
        raise RunError(f"{world_size()} processes were launched, and {state.num_processes} of them train together")


def check_together(accelerator: Accelerator) -> None:
    """Refuse to train where accelerate set itself up otherwise than the launcher said.

    Raises:
        RunError: the processes would train apart, or would not spread the weights.
    """
    kind = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(accelerator.distributed_type.value)
    if accelerator.num_processes != world_size() or (world_size() > 1 and kind != sharding()):
        raise RunError(
            f"{world_size()} processes were launched with sharding {sharding()}, and accelerate would train "
            f"{accelerator.num_processes} together with sharding {kind}"
        )


def forget_deepspeed() -> Callable[[], None]:
    """Make transformers forget DeepSpeed's configuration, by which it loads models in shares, and waits for the other
    processes at every token. Returns what reminds it.
    """
    integration = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    config = reference() if reference else None
    if integration is None or config is None:
        return lambda: None
    integration.unset_hf_deepspeed_config()
    return lambda: integration.set_hf_deepspeed_config(config)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, the process knows of no other: no library takes part in what the launcher started."""
    names = [name for name in os.environ if name in _LAUNCHED or name.startswith(("TORCHELASTIC_", "ACCELERATE_USE_"))]
    kept = {name: os.environ.pop(name) for name in names}
    remind = forget_deepspeed()
    try:
        yield
    finally:
        os.environ.update(kept)
        remind()


class SharedStage:
    """A `Stage` that the main process holds and all processes follow."""

    def __init__(self, folder: Path, stage: Stage | None, result: JSONObject | None) -> None:
        self.folder = folder
        self.result = result
        """What `finish` wrote, the same in every process; None while the stage is not done."""
        self.grown: dict[str, list[int]] = from_main(stage.grown if stage else {})
        """Of the main process: see `Stage`."""
        self._stage = stage

    def dated(self, template: ChatTemplate, name: str = "template") -> ChatTemplate:
        """The template, writing the time that it wrote when the stage began, in every process.

        One that writes today's date would otherwise give a stage that goes on tomorrow other texts. Every process must
        call it; `name` tells the stage's templates apart.
        """
        now, stage = template.now, self._stage
        if now is None:
            return template
        return replace(template, now=main_alone(lambda: stage.settle(f"{name}_now", now) if stage else now))

    def finish(
        self, metrics: Mapping[str, object], outputs: Mapping[str, Path], state: Path | None = None
    ) -> JSONObject:
        """`Stage.finish` in the main process; every process gets its result. `metrics` of the others are not read.

        How many processes trained, and how the weights were spread over them (`check_together`), is added. Every
        checkpoint of the stage gets its model card.
        """
        metrics = {**metrics, "processes": world_size(), "sharding": sharding()}
        stage = self._stage

        def finish() -> JSONObject:
            if stage is None:
                return {}
            folders = dict.fromkeys([*outputs.values(), self.folder / ADAPTER], True)
            folders |= dict.fromkeys(sorted(self.folder.glob("policies/step-*")), False)
            write_cards(folders, stage.spec, stage.inputs, metrics)
            return stage.finish(metrics, outputs, state)

        self.result = main_alone(finish)
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        return self.result


@contextmanager
def shared_stage(
    folder: Path,
    name: str,
    settings: TrainedSettings,
    inputs: Mapping[str, Path | str],
    *,
    grows: Collection[str] = (),
) -> Iterator[SharedStage]:
    """Open a stage in all processes: the main one locks and writes it, the others wait for its result.

    Inside, what is printed to stdout goes to stderr: stdout is for results, and transformers prints there.

    Raises:
        InputError: the device cannot be used, or `Stage` refuses the folder; in all processes.
    """
    if sharding() and getattr(settings, "is_quantized", False):
        raise InputError(
            f"{sharding()} cannot spread a quantised base; leave --quantize out, or launch without sharding"
        )
    if world_size() > 1:
        join_processes(settings.device)
    else:
        check_processes(settings.device)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        stages: list[Stage] = []

        def open_stage() -> JSONObject | None:
            stages.append(stack.enter_context(Stage(folder, name, settings, inputs, grows=grows)))
            return stages[0].result

        result = main_alone(open_stage)
        if result is not None and is_main():  # a process that was killed just before its end left it
            shutil.rmtree(folder / WORK, ignore_errors=True)
        yield SharedStage(folder, stages[0] if stages else None, result)


def from_main(value: T) -> T:
    """The main process's value, in every process; they wait for it as long as it takes, and use no GPU to wait."""
    if world_size() == 1:
        return value
    import torch

    values: list[T] = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=_waiting_group())
    return values[0]


def main_alone(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, which alone does it, in every process.

    Raises:
        AlmostError: what it raised, in every process: otherwise they would wait for one that has ended.
    """
    if world_size() == 1:
        return work()
    value: T | None = None
    error: AlmostError | None = None
    if is_main():
        try:
            value = work()
        except AlmostError as raised:
            error = raised
    error, value = from_main((error, value))
    if error is not None:
        raise error
    return cast(T, value)


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier(group=_waiting_group())


def _waiting_group() -> ProcessGroup:
    """All processes over gloo. With NCCL a wait would keep the GPU busy, and end after a time."""
    import torch

    global _group
    if _group is None or _group[0] is not torch.distributed.group.WORLD:
        world = torch.distributed.group.WORLD
        assert world is not None  # `join_processes` has been called
        _group = (world, torch.distributed.new_group(backend="gloo", timeout=WAIT))
    return _group[1]
