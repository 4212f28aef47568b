"""The learning rate of every trainer: a linear rise, then a constant, a line or a cosine.

transformers' schedules multiply the peak rate by step / warm-up, so their first step changes nothing. Here the rise
begins at 1 / warm-up, and every step is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def learning_rate_factor(update: int, total: int, warmup_share: float, schedule: str) -> float:
    """What the peak rate is multiplied by at an update.

    With w = warm-up updates, rounded up: (update + 1) / w while update < w. After them, with p the share of the other
    updates that is done (0 at the first of them): 1, 1 - p, or (1 + cos(pi p)) / 2.

    Args:
        update: counted from 0.
        total: updates of the whole training.
        warmup_share: of all updates.
        schedule: `constant`, `linear` or `cosine`.
    """
    warmup = math.ceil(total * warmup_share)
    if update < warmup:
        return (update + 1) / warmup
    part = (update - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[schedule]


class OwnSchedule:
    """Mixed into trainers of transformers: their rate follows `rate_factor`."""

    rate_factor: Callable[[int], float]
    """From an update, counted from 0, to what the peak rate is multiplied by; set before training."""
    optimizer: Any
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The hook of transformers, called once the optimiser is made."""
        from torch.optim.lr_scheduler import LambdaLR

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.rate_factor)
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """transformers', with the rate of this run: a shorter run's last checkpoint holds the rate of its own end."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            update = self.lr_scheduler.state_dict()["last_epoch"]
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.rate_factor(update)
            schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
