"""Offline DPO: a policy learns from comparisons to prefer the better answer, with no reward model and no sampling.

The loss is -log sigmoid(beta * ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))), arXiv 2305.18290; the
reference is the policy that training starts from, usually SFT's. The comparisons are those of `synthesize comparisons`,
or anyone's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import TemplateError
from almost_eval.files import Row, read_rows
from almost_eval.models.chat import ChatTemplate
from almost_eval.models.checkpoint import context_length, find_checkpoint
from almost_eval.progress import Progress
from almost_eval.types import JSONObject
from almost_train.common.batches import NO_LOSS, batch_plan, planned_dataset
from almost_train.common.config import option
from almost_train.common.fit import MODEL, fit
from almost_train.common.held_out_loss import HeldOutRows, held_out_figures, refuse_without_rows
from almost_train.common.lora import check_lora
from almost_train.common.merge import training_base
from almost_train.common.policy import policy_tokenizer
from almost_train.common.processes import is_main, shared_stage
from almost_train.common.special_text import SKIP_SPECIAL, SpecialText
from almost_train.common.stage import model_input
from almost_train.common.templates import keep_template
from almost_train.common.trainers import check_batches
from almost_train.dpo.trainer import (
    PreferenceSettings,
    check_loss,
    held_out_sums,
    make_trainer,
    pair_collator,
    pair_row,
    preference_trainer_class,
    shortened,
)
from almost_train.reward.pairs import SKIP_EMPTY, RewardPair, no_pair, plain_pairs, read_comparisons
from almost_train.sft.run import answer_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class DPOSettings(PreferenceSettings):
    """Settings of `train_dpo`."""

    eval_every: int = option(
        0, "optimiser steps between two measurements on held-out pairs; the best checkpoint is kept; 0: none", least=0
    )
    eval_share: float = option(0.1, "share of the prompts held out, where no file of comparisons is", least=0, most=0.5)
    skip_empty: bool = option(False, SKIP_EMPTY)
    skip_special: bool = option(False, SKIP_SPECIAL)


def train_dpo(
    settings: DPOSettings,
    comparisons: Path | str,
    policy: str,
    output: Path,
    *,
    eval_comparisons: Path | str | None = None,
    progress: Progress | None = None,
) -> JSONObject:
    """Train a policy on comparisons and measure it on held-out ones.

    Args:
        settings: see `DPOSettings`.
        comparisons: a file or a data set of the hub, in any format of `almost_train.common.formats`.
        policy: the SFT checkpoint: where training starts, and the reference.
        output: the stage's folder: `model/` (the checkpoint, with its chat template) and `log.jsonl`.
        eval_comparisons: held-out pairs, in place of a share of the prompts.
        progress: where to show the steps.

    Returns:
        `result.json`, the same in every process of `accelerate launch`.

    Raises:
        InputError: settings, data or model that cannot be used; before any weight is loaded.
        RunError: the loss or the gradient is not finite.
    """
    progress = progress or Progress()

    # 1. What is refused without weights.
    checkpoint = find_checkpoint(policy)
    check_batches(settings)
    check_loss(settings)
    check_lora(settings, settings.device)
    data = read_comparisons(comparisons, eval_comparisons, margin=None, skip_empty=settings.skip_empty)
    inputs = {**data.inputs, "policy": model_input(policy)}
    train, held_out, dropped = data.split(settings.eval_share, settings.seed)
    refuse_without_rows(settings.eval_every, len(held_out), "give --eval-share or --eval-comparisons")
    with shared_stage(output, "dpo", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result

        # 2. Pairs as token ids.
        tokenizer = policy_tokenizer(checkpoint)
        template = stage.dated(keep_template(tokenizer))
        limit = min(settings.max_length, context_length(checkpoint.config, tokenizer))
        special = SpecialText.of(tokenizer, template)
        train, unplain = plain_pairs(train, special, skip=settings.skip_special)
        held_out, eval_unplain = plain_pairs(held_out, special, skip=settings.skip_special)
        rows, unusable = encode_rows(train, tokenizer, template, limit)
        eval_rows, eval_unusable = encode_rows(held_out, tokenizer, template, limit)
        dropped += unusable + unplain
        eval_unusable += eval_unplain
        if not rows:
            raise no_pair(comparisons, dropped)
        refuse_without_rows(settings.eval_every, len(eval_rows), "none of the held-out pairs fits --max-length")
        measured = None
        if eval_rows:
            some = [{**row, "weight": 1.0} for row in eval_rows]
            measured = HeldOutRows(some, held_out_sums, settings.eval_every, settings.micro_batch_size)
        lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
        plan = batch_plan(lengths, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed)
        plan = shortened(plan, settings.batch_size, settings.max_steps)

        # 3. Training.
        checkpoint = training_base(checkpoint, output, settings, bf16=settings.bf16)
        progress.note(f"dpo: {len(rows)} pairs ({data.training.format}), {plan.steps} steps of {settings.batch_size}")
        if repeats := data.repeat_figures():
            told = " and ".join(f"{count} {name.replace('_', ' ')}" for name, count in repeats.items())
            progress.note(f"dpo: {comparisons} has {told}, which are trained on as they are")
        fit(
            lambda: make_trainer(
                preference_trainer_class(),
                settings,
                checkpoint,
                tokenizer,
                planned_dataset(rows, filler_row(rows[0]), plan),
                output,
                pair_collator(int(tokenizer.pad_token_id)),
            ),
            stage,
            plan.steps,
            progress,
            settings,
            measured,
        )

        # 4. Figures of the log.
        metrics: JSONObject = {}
        if is_main():
            log = read_rows(output / "log.jsonl")
            last = log[-1]
            read = [rows[row] for row in plan.order if row is not None]
            metrics = {
                "format": data.training.format,
                "train_pairs": len(rows),
                "steps": plan.steps,
                "max_length": limit,
                "answer_tokens": sum(answer_tokens(row) for row in read),
                "dropped": dict(sorted(dropped.items())),
                "eval_dropped": dict(sorted(eval_unusable.items())),
                **data.empty_figures(),
                **repeats,
                "loss_first_step": log[0]["loss"],
                "loss_last_step": last["loss"],
                **{f"{name}_last_step": last[name] for name in ("accuracy", "chosen_logratio", "rejected_logratio")},
                **held_out_figures(log, measured),
            }
        return stage.finish(metrics, {MODEL: output / MODEL})


def encode_rows(
    pairs: Sequence[RewardPair], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, limit: int
) -> tuple[list[Row], Counter[str]]:
    """The pairs as rows of token ids (`pair_row`), and how many could not be used, by reason.

    Raises:
        TemplateError: a dialogue that the template refuses, with its file and row.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for pair in pairs:
        try:
            chosen, rejected = (answer_row(tokenizer, template, side) for side in (pair.chosen, pair.rejected))
        except TemplateError as error:
            raise TemplateError(f"{pair.where}: {error}") from None
        if chosen.input_ids == rejected.input_ids:
            dropped["same_text"] += 1
        elif max(len(chosen.input_ids), len(rejected.input_ids)) > limit:
            dropped["too_long"] += 1
        else:
            rows.append(pair_row(chosen, rejected))
    return rows, dropped


def filler_row(row: Row) -> Row:
    """A short pair to fill a batch up with; the plan gives it the weight 0."""
    return {name: values[-2:] for name, values in row.items()}


def answer_tokens(row: Row) -> int:
    """Tokens of both answers that the loss reads."""
    return sum(label != NO_LOSS for side in ("chosen", "rejected") for label in row[f"{side}_labels"])
