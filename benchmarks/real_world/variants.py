"""The paper's ablations (arXiv 2305.13735, section 4): filters of the comparisons, self-play with no reward model. And
other ways from the same data to a policy, tried because the recipe's own does not reach its goal on Static HHH.

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
_REWARD = (*_ANSWERS, "as_is_reward", "comparisons", "reward")
_DPO = "{lora_rank: 16, merge: true, bf16: true, learning_rate: 1.0e-4, batch_size: 16, micro_batch_size: 4}"
VARIANTS = {
    "no filter": Variant((*_NO_AS_IS, "comparisons.length_rule=false"), _ANSWERS, "reward"),
    "length rule": Variant(_NO_AS_IS, _ANSWERS, "reward"),
    "as-is": Variant(("comparisons.length_rule=false",), (*_ANSWERS, "as_is_reward"), "reward"),
    "balanced": Variant(("comparisons.balance_length=true",), (*_ANSWERS, "as_is_reward"), "reward"),
    "unguided": Variant(("self_play.unguided=true",), _REWARD, "sft"),
    "full sft": Variant(
        ("sft.lora_rank=0", "sft.merge=false", "sft.learning_rate=2.0e-5"), (*_REWARD, "self_play"), "sft"
    ),
    "dpo": Variant(("rlsf=null", f"dpo={_DPO}"), (*_REWARD, "self_play", "sft"), "dpo"),
}
"""Name -> variant. The recipe has both filters, guided self-play, and SFT by a LoRA. Not in the paper: `balanced` has
both filters, and then as many pairs with the shorter answer chosen as with the longer; `full sft` trains all
weights; `dpo` goes on from the SFT policy with the comparisons themselves."""


def policies(runs: Path) -> dict[str, Path]:
    """Variant -> the policy that it ends with, of those that are made."""
    ends = {name: folder_of(runs, name) / variant.until / "model" for name, variant in VARIANTS.items()}
    return {name: end for name, end in ends.items() if VARIANTS[name].until != "reward" and end.exists()}


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
