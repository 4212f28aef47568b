"""The loss on held-out rows while a model trains, and the checkpoint where it was lowest.

A measurement stands in the row of `log.jsonl` of its step, as `eval_loss` and more. So a training that goes on knows
every earlier one, and ends in the checkpoint that an uninterrupted one keeps.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import InputError, RunError
from almost_eval.files import Row
from almost_eval.types import JSONObject
from almost_train.common.processes import is_main, main_alone, wait_for_all
from almost_train.common.sealed import damage, seal

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer

Inputs = dict[str, "torch.Tensor"]
ITEMS = "items"
"""Name of the count that the other sums are divided by."""


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """What is measured."""

    rows: Sequence[Row]
    """As the trainer's collator takes them; at least one."""
    sums: Callable[[Trainer, nn.Module, Inputs], Mapping[str, torch.Tensor]]
    """Trainer, model and one collated batch -> a sum for each figure, `loss` among them, and `items`, their divisor."""
    every: int
    """Steps between two measurements. The last step is measured in any case; with 0 it alone is, and nothing is kept
    but the last model."""
    batch: int
    """Rows of one forward pass."""

    def due(self, step: int, steps: int) -> bool:
        """Whether the model after `step` of `steps` is to be measured."""
        return step == steps or bool(self.every and step % self.every == 0)


def refuse_without_rows(eval_every: int, rows: int, how: str) -> None:
    """Refuse measurements without anything to measure.

    Raises:
        InputError: `eval_every` is not 0, and no row is held out; `how` says what to do.
    """
    if eval_every and not rows:
        raise InputError(f"--eval-every measures held-out rows, and there are none; {how}")


def measure(trainer: Trainer, held_out: HeldOutRows) -> dict[str, float]:
    """The model as it is now: `eval_loss` and the other figures, the same in every process.

    Nothing random is drawn, and the model trains on as if it had not been measured.
    """
    import torch
    from accelerate.utils import gather_object

    rows, size = held_out.rows, held_out.batch
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    rank, processes = trainer.args.process_index, trainer.args.world_size
    model: nn.Module = trainer.model_wrapped
    training = model.training
    totals: dict[str, float] = {}
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            # Every process calls the model equally often, or one with sharded weights would wait for the others.
            for at in range(rank, math.ceil(len(batches) / processes) * processes, processes):
                inputs = trainer._prepare_inputs(trainer.data_collator(list(batches[min(at, len(batches) - 1)])))
                sums = held_out.sums(trainer, model, inputs)
                for name, value in sums.items() if at < len(batches) else ():
                    totals[name] = totals.get(name, 0.0) + float(value)
    finally:
        model.train(training)
    shares: list[dict[str, float]] = gather_object([totals])
    whole = {name: math.fsum(share.get(name, 0.0) for share in shares) for name in shares[0]}
    return {f"eval_{name}": total / whole[ITEMS] for name, total in whole.items() if name != ITEMS}


def best_row(log: Sequence[Row]) -> Row | None:
    """The row of a log with the lowest `eval_loss`, the first of equal ones; None where none was measured."""
    measured = [row for row in log if "eval_loss" in row]
    return min(measured, key=lambda row: row["eval_loss"]) if measured else None


def held_out_figures(log: Sequence[Row], held_out: HeldOutRows | None) -> JSONObject:
    """For `result.json`: what was measured of the saved model, and after which step that is; {} where nothing was."""
    if held_out is None:
        return {}
    row = best_row(log) if held_out.every else log[-1]
    assert row is not None  # the last step is always measured
    figures = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    return {"held_out": {"rows": len(held_out.rows), **figures}, "saved_step": row["step"]}


class BestModel:
    """The models in `.work` that may turn out to be the best: `best-000040` is that after step 40.

    Args:
        work: the folder.
        log: rows so far; a model of a later step is removed: it is made again.
    """

    def __init__(self, work: Path, log: Sequence[Row]) -> None:
        self._work = work
        row = best_row(log)
        self.loss: float = row["eval_loss"] if row else math.inf
        self.step: int = row["step"] if row else 0
        self._safe = log[-1]["step"] if log else 0
        if is_main():
            for folder in work.glob("best-*"):
                if folder.suffix or int(folder.name.split("-")[1]) > self._safe:
                    shutil.rmtree(folder)
        main_alone(self._refuse_damaged)

    def _refuse_damaged(self) -> None:
        problem = damage(self.folder) if self.folder.is_dir() else "it is missing"
        if self.step and problem:
            raise RunError(
                f"{self.folder}, the best model so far, is damaged ({problem}); put it back, or choose another "
                "--output to begin anew"
            )

    @property
    def folder(self) -> Path:
        """That of the best so far."""
        return self._folder(self.step)

    def consider(self, step: int, loss: float, save: Callable[[Path], None]) -> None:
        """Keep the model of this step where its loss is lower than all before; `save` writes it, in every process."""
        if not loss < self.loss:
            return
        older, self.loss, self.step = self.step, loss, step
        scratch = self.folder.with_suffix(".part")
        save(scratch)
        wait_for_all()
        if is_main():
            seal(scratch)
            scratch.rename(self.folder)
            if older > self._safe:  # no checkpoint to resume from is later than it
                shutil.rmtree(self._folder(older), ignore_errors=True)

    def checkpoint_saved(self, step: int) -> None:
        """A training that goes on will begin after this step: what was best before an earlier one is not needed."""
        self._safe = step
        if is_main():
            for folder in self._work.glob("best-*"):
                if folder != self.folder:
                    shutil.rmtree(folder)

    def _folder(self, step: int) -> Path:
        return self._work / f"best-{step:06d}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a training measures as it goes, if anything."""

    trainer: Trainer
    steps: int
    """Of the whole training."""
    held_out: HeldOutRows | None
    best: BestModel | None
    """None where only the last model counts."""
    save: Callable[[Path], None]
    """Writes the trainer's model as a checkpoint, in every process."""

    def after(self, step: int) -> dict[str, float]:
        """The figures of the model after a step, for its row of the log; {} where none are due."""
        if self.held_out is None or not self.held_out.due(step, self.steps):
            return {}
        figures = measure(self.trainer, self.held_out)
        if self.best:
            self.best.consider(step, figures["eval_loss"], self.save)
        return figures
