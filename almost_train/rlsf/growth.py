"""More steps for a run that has ended or was killed: what that does to the learning rate, and what is told of it.

The schedule is that of the new number of steps, from the step at which the run goes on. The steps before had the rates
of the old number. Where these are the same (a constant rate, and no warm-up or one of the same length), the result is
that of a run which was never stopped; elsewhere it is not, and one line says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from almost_train.common.schedule import learning_rate_factor
from almost_train.rlsf.job import RLSFSettings

GROWS = ("steps",)
"""The settings of RLSF that may grow."""


def as_never_stopped(settings: RLSFSettings, earlier: Sequence[int]) -> bool:
    """Whether all updates had the learning rate that a run of `settings.steps` gives them.

    Args:
        settings: with the new number of steps.
        earlier: numbers of steps that the run had before, ascending.
    """
    updates = 1
    if settings.algorithm == "ppo":
        updates = settings.ppo_epochs * (settings.batch_size // settings.mini_batch_size)

    def factor(update: int, steps: int) -> float:
        return learning_rate_factor(update, steps * updates, settings.warmup_ratio, settings.schedule)

    return all(
        factor(update, steps) == factor(update, settings.steps)
        for before, steps in pairwise([0, *earlier])
        for update in range(before * updates, steps * updates)
    )


def growth_note(settings: RLSFSettings, earlier: Sequence[int]) -> str:
    """One line for the user; see `as_never_stopped`."""
    old, new = earlier[-1], settings.steps
    if as_never_stopped(settings, earlier):
        return f"{old} steps become {new}: the learning rates are those of a run of {new} steps from its start"
    return (
        f"{old} steps become {new}: the steps done had the learning rate of a run of {old} (warm-up and schedule), the "
        f"others have that of a run of {new}; the result is not that of one run of {new} steps"
    )


def last_checkpoint(work: Path, steps: int) -> Path | None:
    """The checkpoint after all steps, from which a run with more steps goes on."""
    names = (f"step-{steps:06d}", f"checkpoint-{steps}")  # PPO's, and that of TRL's trainers
    return next((work / name for name in names if (work / name).is_dir()), None)
