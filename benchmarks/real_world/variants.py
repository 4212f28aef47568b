"""The paper's ablations (arXiv 2305.13735, section 4): filters of the comparisons, self-play with no reward model.

A variant is the recipe with other settings, in a folder of its own. Stages that its settings leave as they are are
linked from the recipe's run and not made again. One seed each: three would take three times as long.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variant:
    """One ablation."""

    values: Sequence[str]
    """Settings in place of the recipe's, as `almost-train run --set` takes them."""
    shared: Sequence[str]
    """Stages that are those of the recipe's run."""
    until: str
    """The last stage that differs."""


_NO_AS_IS = ("as_is_reward=null",)
_ANSWERS = ("prompts", "responses")
VARIANTS = {
    "no filter": Variant((*_NO_AS_IS, "comparisons.length_rule=false"), _ANSWERS, "reward"),
    "length rule": Variant(_NO_AS_IS, _ANSWERS, "reward"),
    "as-is": Variant(("comparisons.length_rule=false",), (*_ANSWERS, "as_is_reward"), "reward"),
    "balanced": Variant(("comparisons.balance_length=true",), (*_ANSWERS, "as_is_reward"), "reward"),
    "unguided": Variant(("self_play.unguided=true",), (*_ANSWERS, "as_is_reward", "comparisons", "reward"), "sft"),
}
"""Name -> variant. The recipe itself has both filters, and guided self-play. `balanced` has both filters, and then as
many pairs with the shorter answer chosen as with the longer: the paper has no such filter."""


def folder_of(runs: Path, name: str) -> Path:
    """Where a variant is."""
    return runs / name.replace(" ", "-")


def link_stages(source: Path, folder: Path, stages: Sequence[str]) -> None:
    """Put finished stages of another run into a run's folder: the files are the same, by hard links."""
    for stage in stages:
        if (source / stage / "result.json").exists() and not (folder / stage).exists():
            scratch = folder / f".{stage}"
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(source / stage, scratch, copy_function=os.link)
            scratch.rename(folder / stage)
