"""How many workers there are, and what each of them has of the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from almost_eval.errors import InputError

EACH_GPU = "GPUS"
"""The value of `--workers` that stands for one worker on each visible GPU."""


@dataclass(frozen=True, slots=True)
class Share:
    """What workers have of a machine."""

    workers: int
    threads: int
    """Of a worker's arithmetic."""
    devices: tuple[str, ...] | None
    """Place of a worker -> its `CUDA_VISIBLE_DEVICES`; None on a CPU."""


def requested(workers: int | str | None) -> int | None:
    """The number of `--workers`; None where it is `GPUS` or left out.

    Raises:
        InputError: it is neither.
    """
    if workers is None or str(workers).upper() == EACH_GPU:
        return None
    if not str(workers).isdecimal() or int(workers) < 1:
        raise InputError(f"--workers {workers}: give a number of at least 1, or {EACH_GPU} for one on each visible GPU")
    return int(workers)


def local_share(workers: int | str, device: str, gpus_each: int) -> Share:
    """What each of the workers of this machine gets, where a copy of the model takes `gpus_each` GPUs.

    Raises:
        InputError: there are no GPUs, or too few; or a device that only one worker can have.
    """
    number = requested(workers)
    if device == "cuda":
        gpus = visible_gpus()
        groups = tuple(",".join(gpus[at : at + gpus_each]) for at in range(0, len(gpus) - gpus_each + 1, gpus_each))
        if not groups:
            raise InputError(f"--workers: a worker takes {gpus_each} GPUs, and {len(gpus)} are visible here")
        if number is not None and number > len(groups):
            each = "" if gpus_each == 1 else f" with {gpus_each} GPUs each"
            raise InputError(
                f"--workers {number}: the visible GPUs are enough for {len(groups)}{each}; give --workers {EACH_GPU}, "
                "or --device cpu"
            )
        groups = groups[: number or len(groups)]
        return Share(len(groups), threads_each(len(groups)), groups)
    if number is None:
        raise InputError(f"--workers {EACH_GPU}: no GPU is visible here ({device} is in use); give a number of workers")
    if device != "cpu" and number > 1:
        raise InputError(
            f"--workers {number}: all of them would share {device}; leave out --device, and choose GPUs by "
            "CUDA_VISIBLE_DEVICES"
        )
    return Share(number, threads_each(number), None)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def threads_each(workers: int) -> int:
    """Threads of each worker: its share of the cores, or what `OMP_NUM_THREADS` says.

    No worker is bound to cores: two runs on one machine would bind theirs to the same.
    """
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    return max(1, len(os.sched_getaffinity(0)) // workers)
