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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import DataError, ModelError, TemplateError
from almost_eval.files import Row, read_rows
from almost_eval.models.chat import ChatTemplate, encode_with_completion_mask
from almost_eval.models.checkpoint import Checkpoint, context_length, find_checkpoint
from almost_eval.progress import Progress
from almost_eval.types import Conversation, JSONObject
from almost_train.common.batches import NO_LOSS, BatchPlan, batch_plan, planned_dataset
from almost_train.common.config import option
from almost_train.common.fit import MODEL, fit
from almost_train.common.formats import Records, read_dialogues
from almost_train.common.held_out_loss import ITEMS, HeldOutRows, held_out_figures, refuse_without_rows
from almost_train.common.lora import add_lora, check_lora
from almost_train.common.merge import training_base
from almost_train.common.policy import load_causal_lm, policy_tokenizer, stop_at_eos
from almost_train.common.processes import is_main, shared_stage
from almost_train.common.records import has_question
from almost_train.common.special_text import SKIP_SPECIAL, SpecialText, without_special
from almost_train.common.split import opening, split_by_prompt
from almost_train.common.stage import model_input
from almost_train.common.tables import Table, read_any
from almost_train.common.templates import keep_template
from almost_train.common.train_settings import HeldOutSettings
from almost_train.common.trainers import QuietTrainer, check_batches, trainer_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
    from trl import SFTTrainer


@dataclass(frozen=True, slots=True)
class SFTSettings(HeldOutSettings):
    """Settings of `train_sft`."""

    epochs: int = option(3, "passes over the data", least=1)
    max_length: int = option(512, "longest row, tokens; answers beyond it are dropped and counted, never cut", least=8)
    batch_size: int = option(64, "answers of one optimiser step, over all devices", least=1)
    eval_share: float = option(
        0.0, "share of the first prompts held out, where no file of dialogues is", least=0, most=0.5
    )
    skip_special: bool = option(False, SKIP_SPECIAL)
    packing: bool = option(False, "several answers share a row of max_length tokens, of which batch_size are a step")


def train_sft(
    settings: SFTSettings,
    demonstrations: Path | str,
    model: str,
    output: Path,
    *,
    eval_demonstrations: Path | str | None = None,
    progress: Progress | None = None,
) -> JSONObject:
    """Fine-tune a causal LM on demonstrations.

    Args:
        settings: see `SFTSettings`.
        demonstrations: a file or a data set of the hub, in any format of `almost_train.common.formats`.
        model: the language model: a directory, a built-in name or a hub id.
        output: the stage's folder: `model/` (the checkpoint, with its chat template) and `log.jsonl`.
        eval_demonstrations: held-out dialogues, in place of a share; dialogues for training that begin as one of them
            does are dropped.
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
    inputs: dict[str, Path | str] = {"demonstrations": table.input, "model": model_input(model)}
    eval_table = read_any(eval_demonstrations) if eval_demonstrations else None
    if eval_table:
        inputs["eval_demonstrations"] = eval_table.input
    held_out = read_dialogues(eval_table) if eval_table else None
    split = split_by_prompt(
        _numbered(source),
        None if held_out is None else _numbered(held_out),
        lambda one: opening(one[1]),
        settings.eval_share,
        settings.seed,
    )
    refuse_without_rows(settings.eval_every, len(split.held_out), "give --eval-share or --eval-demonstrations")
    with shared_stage(output, "sft", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result

        # 2. Answers as token ids.
        tokenizer = policy_tokenizer(checkpoint)
        limit = min(settings.max_length, context_length(checkpoint.config, tokenizer))
        template = stage.dated(keep_template(tokenizer))
        special = SpecialText.of(tokenizer, template)

        def answers(part: list[Numbered], of: Table) -> tuple[list[TrainingRow], Counter[str]]:
            kept, left_out = without_special(
                part, special, lambda one: one[1], lambda one: of.where(one[0]), skip=settings.skip_special
            )
            dialogues, given = [one[1] for one in kept], [one[2] for one in kept]
            rows, dropped = training_rows(
                tokenizer, template, dialogues, limit, lambda at: of.where(kept[at - 1][0]), given
            )
            return rows, dropped + Counter({"special_token": len(left_out)} if left_out else {})

        rows, dropped = answers(split.training, table)
        dropped += Counter({"prompt_in_eval": split.dropped} if split.dropped else {})
        if not rows:
            cure = {
                "answer_too_long": "; raise --max-length",
                "dialogue_too_long": "; raise --max-length",
                "prompt_in_eval": "; the held-out file has all of their prompts",
                "special_token": "; their texts hold special tokens",
            }.get(max(dropped, key=lambda reason: dropped[reason], default=""), "")
            raise DataError(f"{demonstrations} leaves no answer to train on (dropped: {dict(dropped)}){cure}")
        eval_rows, eval_dropped = answers(split.held_out, eval_table or table)
        refuse_without_rows(settings.eval_every, len(eval_rows), "none of the held-out answers fits --max-length")
        measured = None
        if eval_rows:
            some = [_columns(row) for row in eval_rows]
            measured = HeldOutRows(some, _held_out_sums, settings.eval_every, settings.micro_batch_size)
        units = packed(rows, limit) if settings.packing else [_columns(row) for row in rows]
        lengths = [len(unit["input_ids"]) for unit in units]
        plan = batch_plan(lengths, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed)

        # 3. Training.
        checkpoint = training_base(checkpoint, output, settings, bf16=settings.bf16)
        progress.note(f"sft: {len(rows)} answers ({source.format}), {plan.steps} steps of {settings.batch_size}")
        fit(
            lambda: _trainer(settings, checkpoint, tokenizer, units, plan, output),
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
            metrics = {
                "format": source.format,
                "dialogues": len(split.training),
                "answers": len(rows),
                **({"packed_rows": len(units)} if settings.packing else {}),
                "tokens": sum(lengths),
                "tokens_with_loss": sum(label != NO_LOSS for row in rows for label in row.labels),
                "steps": plan.steps,
                "max_length": limit,
                "dropped": dict(sorted(dropped.items())),
                "loss_first_step": log[0]["loss"],
                "loss_last_step": log[-1]["loss"],
                **held_out_figures(log, measured),
                **({"eval_dropped": dict(sorted(eval_dropped.items()))} if split.held_out else {}),
            }
        return stage.finish(metrics, {MODEL: output / MODEL})


# --- data ---


Numbered = tuple[int, Conversation, int]
"""(row, dialogue, messages that are not learned)."""


def _numbered(source: Records[Conversation]) -> list[Numbered]:
    return list(zip(source.numbers, source.records, source.given, strict=True))


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
    given: Sequence[int] = (),
) -> tuple[list[TrainingRow], Counter[str]]:
    """A row for every answer that fits `limit` tokens together with the dialogue before it; and counts of the others.

    An answer that does not fit is left out, and so are all later ones of its dialogue (`answer_too_long`): they are
    longer. One before which no user has said a word is left out too (`no_prompt`). A dialogue without a row also counts
    as `dialogue_too_long` or `no_answer`.

    Args:
        tokenizer: the model's.
        template: how it writes a dialogue.
        dialogues: to learn from.
        limit: tokens of a row.
        where: what an error calls a dialogue, counted from 1.
        given: of each dialogue, how many of its messages, from the first, are not learned; none where left out.

    Raises:
        TemplateError: a dialogue that the template refuses; with what `where` calls it, counted from 1.
    """
    rows: list[TrainingRow] = []
    dropped: Counter[str] = Counter()
    for number, dialogue in enumerate(dialogues, 1):
        first = given[number - 1] if given else 0
        ends = [at + 1 for at, message in enumerate(dialogue) if message.role == "assistant" and at >= first]
        full = [at for at in ends if dialogue[at - 1].content.strip()]
        written = [at for at in full if has_question(dialogue[:at])]
        kept: list[TrainingRow] = []
        for end in written:
            try:
                row = answer_row(tokenizer, template, dialogue[:end])
            except TemplateError as error:
                raise TemplateError(f"{where(number)}: {error}") from None
            if len(row.input_ids) > limit:
                break
            kept.append(row)
        counts = {
            "answer_empty": len(ends) - len(full),
            "no_prompt": len(full) - len(written),
            "answer_too_long": len(written) - len(kept),
            "dialogue_too_long": bool(written and not kept),
            "no_answer": not written,
        }
        dropped.update({reason: int(count) for reason, count in counts.items() if count})
        rows += kept
    return rows, dropped


def answer_row(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, conversation: Conversation) -> TrainingRow:
    """The row of a dialogue's last answer, which ends in EOS."""
    masked = encode_with_completion_mask(tokenizer, template, conversation)
    ids = list(masked.input_ids)
    labels = [token if wanted else NO_LOSS for token, wanted in zip(ids, masked.completion_mask, strict=True)]
    if tokenizer.eos_token_id not in labels:
        # Some templates end an answer with words of their own ("### End"): EOS is what every program stops at.
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return TrainingRow(ids, labels)


def _columns(row: TrainingRow) -> Row:
    return {"input_ids": row.input_ids, "labels": row.labels}


def packed(rows: Sequence[TrainingRow], limit: int) -> list[Row]:
    """The answers in as few rows of at most `limit` tokens as TRL's best-fit-decreasing makes; `seq_lengths` of each.

    No answer reads another one: each has positions of its own from 0, by which attention tells them apart.
    """
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list([_columns(row) for row in rows])
    return list(pack_dataset(table, limit, "bfd", {"batch_size": len(rows), "keep_in_memory": True}))


# --- the model ---


def _trainer(
    settings: SFTSettings,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    plan: BatchPlan,
    output: Path,
) -> SFTTrainer:
    from trl import SFTConfig, SFTTrainer

    class AnswerTrainer(QuietTrainer, SFTTrainer):
        """TRL's trainer. It does not use the plan's weights: its loss is the mean over the tokens of a batch."""

    model = load_causal_lm(settings, checkpoint)
    if settings.packing:
        check_packing(model, rows, checkpoint)
    stop_at_eos(model, tokenizer)
    if settings.lora_rank:
        model = add_lora(model, settings, checkpoint.path, kind="CAUSAL_LM", seed=settings.seed)
    filler: Row = {"input_ids": rows[0]["input_ids"][:2], "labels": [NO_LOSS] * 2}  # one token predicts none
    if settings.packing:
        filler["seq_lengths"] = [2]
    dataset = planned_dataset(rows, filler, plan)
    trainer = AnswerTrainer(
        model=model,
        args=SFTConfig(
            **trainer_arguments(settings, output),
            packing=settings.packing,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=dataset.remove_columns("weight"),
        processing_class=tokenizer,
    )
    # The loss is divided by the tokens of the whole batch, over all accumulation steps and processes. This holds for
    # models whose `forward` takes no such number too: TRL computes the loss itself.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def _held_out_sums(
    trainer: Trainer, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Loss, in nats, over the answers' tokens of a batch; see `HeldOutRows`."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False).logits
    loss, tokens = token_loss(logits, inputs["labels"])
    return {"loss": loss, ITEMS: tokens}


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of -log p, nats; tokens) over the labels (B, T) that are not `NO_LOSS`, by the logits (B, T, V) before."""
    from torch.nn.functional import cross_entropy

    targets = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=NO_LOSS, reduction="sum")
    return total, (targets != NO_LOSS).sum()


def check_packing(model: PreTrainedModel, rows: Sequence[Row], checkpoint: Checkpoint) -> None:
    """Refuse packing where an answer would read another one, measured on the model itself.

    With sdpa and eager, attention is kept apart by transformers' masks, which some models do not use.

    Raises:
        ModelError: the first tokens of two answers have another loss in one row than each has alone.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if model.config._attn_implementation == "flash_attention_2":  # it is told where each answer begins
        return
    tokens = rows[0]["input_ids"][:16]
    one = [tokens, tokens[::-1]]  # the second would read the first
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def loss(texts: list[list[int]]) -> float:
        ids = [token for text in texts for token in text]
        inputs = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [len(text) for text in texts]}])
        labels = inputs.pop("labels")
        with torch.no_grad():
            return float(token_loss(model(**inputs, use_cache=False).logits, labels)[0])

    model.eval()
    apart, together = loss(one[:1]) + loss(one[1:]), loss(one)
    if not abs(apart - together) <= 1e-3 * (1 + abs(apart)):
        raise ModelError(
            f"{checkpoint.path}: in a packed row an answer would read the one before it ({together:.4f} nats for "
            f"{apart:.4f}); leave --packing out, or use --attention flash_attention_2 on a GPU"
        )
