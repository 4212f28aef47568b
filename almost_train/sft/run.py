"""Supervised fine-tuning of a language model on demonstrations (ALMoST, arXiv 2305.13735, section 3.2), with TRL.

The model learns to write the assistant's answers and to end them; user turns carry no loss. The defaults are the
official settings.

One training row is one answer with the dialogue before it: the tokens that the model reads and writes in use. So the
model learns to end every answer with EOS, even where the format writes EOS after the last answer of a dialogue only, as
ALMoST's own does. A template may render earlier turns as it likes. The price: a dialogue of k answers is read k times.
`batch_size` counts answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import DataError, ModelError, TemplateError
from almost_eval.files import read_rows
from almost_eval.models.chat import ChatTemplate, encode_with_completion_mask
from almost_eval.models.checkpoint import Checkpoint, context_length, find_checkpoint
from almost_eval.models.loading import load_tokenizer, load_weights
from almost_eval.models.tensors import check_weights
from almost_eval.progress import Progress
from almost_eval.types import Conversation, JSONObject
from almost_train.common.batches import NO_LOSS, BatchPlan, batch_plan, planned_dataset
from almost_train.common.config import option
from almost_train.common.formats import read_dialogues
from almost_train.common.lora import BASE, add_lora, base_dtype, check_lora, quantization
from almost_train.common.merge import whole_base
from almost_train.common.processes import is_main, shared_stage
from almost_train.common.stage import model_input
from almost_train.common.tables import read_any
from almost_train.common.trainers import (
    MODEL,
    QuietTrainer,
    TrainSettings,
    check_batches,
    fit,
    keep_template,
    trainer_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer


@dataclass(frozen=True, slots=True)
class SFTSettings(TrainSettings):
    """Settings of `train_sft`."""

    epochs: int = option(3, "passes over the data", least=1)
    max_length: int = option(512, "longest row, tokens; answers beyond it are dropped and counted, never cut", least=8)
    batch_size: int = option(64, "answers of one optimiser step, over all devices", least=1)


def train_sft(
    settings: SFTSettings, demonstrations: Path | str, model: str, output: Path, *, progress: Progress | None = None
) -> JSONObject:
    """Fine-tune a causal LM on demonstrations.

    Args:
        settings: see `SFTSettings`.
        demonstrations: a file or a data set of the hub, in any format of `almost_train.common.formats`.
        model: the language model: a directory, a built-in name or a hub id.
        output: the stage's folder: `model/` (the checkpoint, with its chat template) and `log.jsonl`.
        progress: where to show the steps.

    Returns:
        `result.json`. Under `accelerate launch` every process calls this and gets the same.

    Raises:
        InputError: the settings, the data or the model cannot be used; before any weight is loaded.
        RunError: the loss is not finite.
    """
    progress = progress or Progress()

    # 1. What is refused without weights.
    checkpoint = find_checkpoint(model)
    check_batches(settings)
    check_lora(settings, settings.device)
    table = read_any(demonstrations)
    source = read_dialogues(table)
    dialogues = source.records
    inputs: dict[str, Path | str] = {"demonstrations": table.input, "model": model_input(model)}
    with shared_stage(output, "sft", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result

        # 2. Answers as token ids.
        tokenizer = load_tokenizer(checkpoint)
        check_weights(checkpoint, "AutoModelForCausalLM")
        if tokenizer.special_tokens_map.get("eos_token") is None:
            raise ModelError(
                f"the tokenizer of {checkpoint.path} has no EOS token, so no answer could ever end; set it"
            )
        if tokenizer.special_tokens_map.get("pad_token") is None:
            tokenizer.pad_token = tokenizer.eos_token  # labels and mask mark the padding, so EOS itself is still learnt
        limit = min(settings.max_length, context_length(checkpoint.config, tokenizer))
        rows, dropped = training_rows(tokenizer, keep_template(tokenizer), dialogues, limit, table.where)
        if not rows:
            raise DataError(f"{demonstrations} leaves no answer to train on (dropped: {dict(dropped)})")
        lengths = [len(row.input_ids) for row in rows]
        plan = batch_plan(lengths, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed)

        # 3. Training.
        if settings.lora_rank:
            checkpoint = whole_base(checkpoint, output / BASE, base_dtype(settings, bf16=settings.bf16))
        progress.note(f"sft: {len(rows)} answers ({source.format}), {plan.steps} steps of {settings.batch_size}")
        fit(
            lambda: _trainer(settings, checkpoint, tokenizer, rows, plan, output), stage, plan.steps, progress, settings
        )

        # 4. Figures of the log.
        metrics: JSONObject = {}
        if is_main():
            log = read_rows(output / "log.jsonl")
            metrics = {
                "format": source.format,
                "dialogues": len(dialogues),
                "answers": len(rows),
                "tokens": sum(lengths),
                "tokens_with_loss": sum(label != NO_LOSS for row in rows for label in row.labels),
                "steps": plan.steps,
                "max_length": limit,
                "dropped": dict(sorted(dropped.items())),
                "loss_first_step": log[0]["loss"],
                "loss_last_step": log[-1]["loss"],
            }
        return stage.finish(metrics, {MODEL: output / MODEL})


# --- data ---


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One answer with the dialogue before it."""

    input_ids: list[int]
    """(T,)"""
    labels: list[int]
    """(T,) the token where it carries loss, else `NO_LOSS`; not shifted."""


def training_rows(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    dialogues: Sequence[Conversation],
    limit: int,
    where: Callable[[int], str] = "dialogue {}".format,
) -> tuple[list[TrainingRow], Counter[str]]:
    """A row for every answer that fits `limit` tokens together with the dialogue before it; and counts of the others.

    An answer that does not fit is left out, and so are all later ones of its dialogue (`answer_too_long`): they are
    longer. A dialogue without a row also counts as `dialogue_too_long` or `no_answer`.

    Raises:
        TemplateError: a dialogue that the template refuses; with what `where` calls it, counted from 1.
    """
    rows: list[TrainingRow] = []
    dropped: Counter[str] = Counter()
    for number, dialogue in enumerate(dialogues, 1):
        ends = [at + 1 for at, message in enumerate(dialogue) if message.role == "assistant"]
        written = [at for at in ends if dialogue[at - 1].content.strip()]
        kept: list[TrainingRow] = []
        for end in written:
            try:
                row = _row(tokenizer, template, dialogue[:end])
            except TemplateError as error:
                raise TemplateError(f"{where(number)}: {error}") from None
            if len(row.input_ids) > limit:
                break
            kept.append(row)
        counts = {
            "answer_empty": len(ends) - len(written),
            "answer_too_long": len(written) - len(kept),
            "dialogue_too_long": bool(written and not kept),
            "no_answer": not written,
        }
        dropped.update({reason: int(count) for reason, count in counts.items() if count})
        rows += kept
    return rows, dropped


def _row(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, conversation: Conversation) -> TrainingRow:
    masked = encode_with_completion_mask(tokenizer, template, conversation)
    ids = list(masked.input_ids)
    labels = [token if wanted else NO_LOSS for token, wanted in zip(ids, masked.completion_mask, strict=True)]
    if tokenizer.eos_token_id not in labels:
        # Some templates end an answer with words of their own ("### End"): EOS is what every program stops at.
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return TrainingRow(ids, labels)


# --- the model ---


def _trainer(
    settings: SFTSettings,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TrainingRow],
    plan: BatchPlan,
    output: Path,
) -> SFTTrainer:
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    class AnswerTrainer(QuietTrainer, SFTTrainer):
        """TRL's trainer. It does not use the plan's weights: its loss is the mean over the tokens of a batch."""

    model = load_weights(
        AutoModelForCausalLM,
        checkpoint,
        dtype=base_dtype(settings, bf16=settings.bf16),
        device="cpu",
        attention="auto",
        trust_remote_code=False,
        quantization=quantization(settings),
    )
    stop_at_eos(model, tokenizer)
    if settings.lora_rank:
        model = add_lora(model, settings, checkpoint.path, kind="CAUSAL_LM", seed=settings.seed)
    filler = rows[0].input_ids[:2]  # two tokens: one alone has no next token to predict
    table = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    dataset = planned_dataset(table, {"input_ids": filler, "labels": [NO_LOSS] * len(filler)}, plan)
    trainer = AnswerTrainer(
        model=model,
        args=SFTConfig(**trainer_arguments(settings, output), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=dataset.remove_columns("weight"),
        processing_class=tokenizer,
    )
    # The loss is divided by the tokens of the whole batch, over all accumulation steps and processes. This holds for
    # models whose `forward` takes no such number too: TRL computes the loss itself.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def stop_at_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make transformers and vLLM end an answer at the tokenizer's EOS too, besides the model's earlier end tokens."""
    own = model.generation_config.eos_token_id
    known = [] if own is None else [own] if isinstance(own, int) else list(own)
    ends = [tokenizer.eos_token_id, *(token for token in known if token != tokenizer.eos_token_id)]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
