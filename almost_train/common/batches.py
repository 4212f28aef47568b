"""The order of the training data. It is made from the seed alone, and not by samplers.

It does not depend on the number of processes. The last batch of an epoch is smaller; it is filled up with rows that
carry no loss. So a batch gives the same gradient, however it is divided among devices and accumulation steps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

NO_LOSS = -100
"""The label of a token that carries no loss, as in torch's cross-entropy."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The rows of the whole training in order, batch after batch."""

    order: tuple[int | None, ...]
    """Row numbers; None is a filler without loss. Its length is a multiple of `batch_size`."""
    weights: tuple[float, ...]
    """One for each entry of `order`: batch_size / (rows in its batch), and 0 for a filler. So the weighted mean over a
    batch is the mean over its rows."""
    steps: int
    """Optimiser steps."""


def batch_plan(lengths: Sequence[int], *, batch_size: int, epochs: int, seed: int) -> BatchPlan:
    """Every epoch in its own seeded order, divided into batches; the last batch of an epoch is filled up.

    Inside a batch the longest rows come first (`lengths`, in tokens). Rows of similar length then share a forward pass
    and need little padding; the gradient of a batch does not depend on the order inside it.
    """
    order: list[int | None] = []
    weights: list[float] = []
    for epoch in range(epochs):
        rows = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(rows)
        for at in range(0, len(rows), batch_size):
            batch = sorted(rows[at : at + batch_size], key=lambda row: -lengths[row])
            fillers = batch_size - len(batch)
            order += [*batch, *[None] * fillers]
            weights += [batch_size / len(batch)] * len(batch) + [0.0] * fillers
    return BatchPlan(tuple(order), tuple(weights), len(order) // batch_size)


def planned_dataset(rows: Sequence[Mapping[str, object]], filler: Mapping[str, object], plan: BatchPlan) -> Dataset:
    """A `datasets.Dataset` with the rows in the plan's order, and its `weight` column."""
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list([dict(row) for row in [*rows, filler]])
    table = table.select([len(rows) if row is None else row for row in plan.order])
    return table.add_column("weight", list(plan.weights))
