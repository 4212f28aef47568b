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

from almost_eval.errors import DataError, ModelError, TemplateError
from almost_eval.files import Row, read_rows
from almost_eval.models.chat import ChatTemplate
from almost_eval.models.checkpoint import Checkpoint, context_length, find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.models.tensors import check_weights
from almost_eval.progress import Progress
from almost_eval.types import JSONObject
from almost_train.common.batches import NO_LOSS, batch_plan, planned_dataset
from almost_train.common.config import option
from almost_train.common.held_out_loss import HeldOutRows, held_out_figures, refuse_without_rows
from almost_train.common.lora import BASE, base_dtype, check_lora
from almost_train.common.merge import whole_base
from almost_train.common.processes import is_main, shared_stage
from almost_train.common.stage import model_input
from almost_train.common.trainers import MODEL, check_batches, fit, keep_template
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
from almost_train.reward.pairs import RewardPair, check_margins, read_pairs, split_pairs
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
    source = read_pairs(comparisons)
    check_margins(comparisons, source.pairs, used=False)
    inputs: dict[str, Path | str] = {"comparisons": source.input, "policy": model_input(policy)}
    eval_pairs = None
    if eval_comparisons:
        eval_source = read_pairs(eval_comparisons)
        eval_pairs, inputs["eval_comparisons"] = eval_source.pairs, eval_source.input
    train, held_out, dropped = split_pairs(source.pairs, eval_pairs, settings.eval_share, settings.seed)
    refuse_without_rows(settings.eval_every, len(held_out), "give --eval-share or --eval-comparisons")
    with shared_stage(output, "dpo", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result

        # 2. Pairs as token ids.
        tokenizer = policy_tokenizer(checkpoint)
        template = keep_template(tokenizer)
        limit = min(settings.max_length, context_length(checkpoint.config, tokenizer))
        rows, unusable = encode_rows(train, tokenizer, template, limit)
        eval_rows, eval_unusable = encode_rows(held_out, tokenizer, template, limit)
        dropped += unusable
        if not rows:
            raise DataError(f"{comparisons} leaves no pair to train on (dropped: {dict(dropped)}); see --max-length")
        refuse_without_rows(settings.eval_every, len(eval_rows), "none of the held-out pairs fits --max-length")
        measured = None
        if eval_rows:
            some = [{**row, "weight": 1.0} for row in eval_rows]
            measured = HeldOutRows(some, held_out_sums, settings.eval_every, settings.micro_batch_size)
        lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
        plan = batch_plan(lengths, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed)
        plan = shortened(plan, settings.batch_size, settings.max_steps)

        # 3. Training.
        if settings.lora_rank:
            checkpoint = whole_base(checkpoint, output / BASE, base_dtype(settings, bf16=settings.bf16))
        progress.note(f"dpo: {len(rows)} pairs ({source.format}), {plan.steps} steps of {settings.batch_size}")
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
                "format": source.format,
                "train_pairs": len(rows),
                "steps": plan.steps,
                "max_length": limit,
                "answer_tokens": sum(answer_tokens(row) for row in read),
                "dropped": dict(sorted(dropped.items())),
                "eval_dropped": dict(sorted(eval_unusable.items())),
                "loss_first_step": log[0]["loss"],
                "loss_last_step": last["loss"],
                **{f"{name}_last_step": last[name] for name in ("accuracy", "chosen_logratio", "rejected_logratio")},
                **held_out_figures(log, measured),
            }
        return stage.finish(metrics, {MODEL: output / MODEL})


def policy_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy whose answers end, with a pad token.

    Raises:
        ModelError: it has no EOS token, or the weights do not fit the model.
    """
    tokenizer = load_tokenizer(checkpoint)
    check_weights(checkpoint, "AutoModelForCausalLM")
    if tokenizer.special_tokens_map.get("eos_token") is None:
        raise ModelError(f"the tokenizer of {checkpoint.path} has no EOS token, so no answer could ever end; set it")
    if tokenizer.special_tokens_map.get("pad_token") is None:
        tokenizer.pad_token = tokenizer.eos_token  # the mask marks the padding, so EOS itself is still learnt
    return tokenizer


def encode_rows(
    pairs: Sequence[RewardPair], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, limit: int
) -> tuple[list[Row], Counter[str]]:
    """The pairs as rows of token ids (`pair_row`), and how many could not be used, by reason.

    Raises:
        TemplateError: a dialogue that the template refuses, with the id of its prompt.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for pair in pairs:
        try:
            chosen, rejected = (answer_row(tokenizer, template, side) for side in (pair.chosen, pair.rejected))
        except TemplateError as error:
            raise TemplateError(f"prompt {pair.prompt_id}: {error}") from None
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
