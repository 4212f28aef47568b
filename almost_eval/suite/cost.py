"""What all benchmarks of a model cost: tokens by its tokenizer, seconds by rates, money by a price of an hour.

Tokens to read are counted exactly (`plan.tokens_to_read`: the nodes of the token trie). Tokens to write are at most the
budget of an answer. A read token costs 2 operations a parameter (arXiv 2001.08361, section 2.1; attention is not
counted), a step of sampling one reading of the weights and of the rows' keys and values. Loading is not counted, and
neither is a judge behind an endpoint, whose price `judge/api/cost.py` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from almost_eval.errors import InputError
from almost_eval.suite.hardware import SAMPLING_SHARE, TRAINING_SHARE, Gpu, ModelSize
from almost_eval.suite.plan import Planned
from almost_eval.types import JSONObject

ROWS = 256
"""Answers that one engine writes at a time, at most: vLLM's default."""
FREE = 0.10
"""Share of a GPU's memory that is left to everything but weights, keys and values."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a task has a model do."""

    name: str
    read: int
    """Tokens."""
    answers: int = 0
    write: int = 0
    """Tokens of all answers."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one size of a model takes for all tasks."""

    size: str
    devices: int
    split: int
    """Devices that share a copy of the model."""
    seconds: dict[str, float]
    """Task -> seconds with all devices at work."""

    @property
    def total_seconds(self) -> float:
        """Of all tasks, one after the other."""
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        """Of all devices together."""
        return self.total_seconds * self.devices / 3600

    def money(self, price: float | None) -> float | None:
        """USD at a price of a GPU-hour; None where none is stated."""
        return None if price is None else self.gpu_hours * price

    def to_dict(self, price: float | None) -> JSONObject:
        """As JSON."""
        return {
            "devices": self.devices,
            "split": self.split,
            "seconds": self.seconds,
            "total_seconds": self.total_seconds,
            "gpu_hours": self.gpu_hours,
            "usd": self.money(price),
        }


def work_of(planned: Sequence[Planned], answer_tokens: int | None) -> list[Work]:
    """The work of the tasks that can run; without `answer_tokens` an answer has its budget: times are then at most."""
    return [
        Work(one.name, one.read, one.answers, one.answers * answer_tokens if answer_tokens else one.write)
        for one in planned
        if not one.refused
    ]


def cost_on_gpus(work: Sequence[Work], size: ModelSize, gpu: Gpu, devices: int) -> Cost:
    """The cost of a size on some GPUs, with as many copies of the model as they hold.

    Raises:
        InputError: no division of the model fits.
    """
    split = smallest_split(size, gpu, devices)
    copies = devices // split
    seconds = {one.name: seconds_on_gpus(one, size, gpu, split, copies) for one in work}
    return Cost(size.name, devices, split, seconds)


def smallest_split(size: ModelSize, gpu: Gpu, devices: int) -> int:
    """The fewest devices, a power of two, that hold the weights and some answers."""
    split = 1
    while split <= devices:
        if split * gpu.memory * (1 - FREE) >= size.weight_bytes * 1.1:
            return split
        split *= 2
    need = size.weight_bytes * 1.1 / (1 - FREE)
    raise InputError(
        f"{size.name} does not fit: its bfloat16 weights need {need / 1e9:.0f} GB, and {devices} GPUs have "
        f"{devices * gpu.memory / 1e9:.0f} GB; plan for more --devices, or another --gpu"
    )


def seconds_on_gpus(work: Work, size: ModelSize, gpu: Gpu, split: int, copies: int) -> float:
    """Of one task: the reading, then the writing. `split` devices share a copy of the model, `copies` the samples."""
    reading = 2 * size.parameters * work.read / (gpu.flops * TRAINING_SHARE * split * copies)
    if not work.write or not work.answers:
        return reading
    new = work.write / work.answers
    length = work.read / work.answers + new / 2  # of an answer's keys and values, half written
    room = int((split * gpu.memory * (1 - FREE) - size.weight_bytes) // max(1, size.cache_bytes * (length + new / 2)))
    mine = ceil(work.answers / copies)
    rows = max(1, min(ROWS, mine, room))
    step = (size.weight_bytes + rows * size.cache_bytes * length) / (gpu.bandwidth * SAMPLING_SHARE * split)
    return reading + new * ceil(mine / rows) * step
