"""The models of a recipe that are on this machine, and whether its disk has room for those that it makes."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from almost_eval.errors import InputError, ModelError
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.nano import BUILT_IN
from almost_train.pipeline.recipe import Recipe
from almost_train.reward.run import KINDS

COPIES = {"reward": 4, "sft": 4, "rlsf": 7, "dpo": 4, "online_dpo": 4, "as_is_reward": 4}
"""Stage -> how many times the weights of its model, in float32, it writes at most at one time: the result, and a
checkpoint with AdamW's two moments; PPO's checkpoints hold the value model too."""


def local_checkpoint(model: str, kinds: Collection[str]) -> Checkpoint | None:
    """The checkpoint of a folder or a built-in name, checked; None for a name that only the hub may know.

    Raises:
        ModelError: no such folder, or a model of another kind.
    """
    if model in BUILT_IN or Path(model).exists() or model.startswith(("nano/", "/", ".", "~")):
        return find_checkpoint(model, architectures=kinds)
    if model.count("/") != 1:
        raise ModelError(f"no model at {model!r}: give a checkpoint directory, a hub id (org/name) or a built-in name")
    return None


def check_disk(recipe: Recipe, folder: Path, sections: Collection[str]) -> None:
    """Whether the disk has room for the weights that these stages write, checkpoints to resume from among them.

    Raises:
        InputError: it has less.
    """
    kept, most = 0, 0
    for section, copies in COPIES.items():
        if section not in sections:
            continue
        # RLSF and DPO train what SFT has made.
        starts_at_sft = section in ("rlsf", "dpo", "online_dpo")
        model = recipe.sections.get("sft" if starts_at_sft else section, {}).get("model")
        if recipe.sections[section].get("eval_every"):  # the best so far, and one that may become it
            copies += 2
        checkpoint = local_checkpoint(str(model), KINDS) if model else None
        if checkpoint is None:
            continue
        weights = 4 * checkpoint.n_parameters()
        most = max(most, kept + copies * weights)
        kept += weights
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if most > free:
        raise InputError(
            f"recipe {recipe.name}: its stages write up to {most / 2**30:.1f} GiB of weights at one time, and {there} "
            f"has {free / 2**30:.1f} GiB free; give another --output"
        )
