"""The reward model: Bradley-Terry training on comparisons (ALMoST, arXiv 2305.13735, section 3.1), and how good it is.

The loss is -log sigmoid(r_chosen - r_rejected); the model is a transformers sequence classifier with one label, trained
by TRL's RewardTrainer. The defaults are the official settings.

Departures from the official script: pairs that are too long are dropped and counted, not cut; the score is read at the
last real token whatever a batch is padded with, which a pad token equal to EOS would prevent; and the accuracy is shown
beside what "the longer answer wins" gets on the same pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from almost_eval.errors import ModelError
from almost_eval.files import Row, read_rows, write_rows
from almost_eval.models.checkpoint import CAUSAL, Checkpoint, context_length, find_checkpoint
from almost_eval.models.loading import load_tokenizer, settled_attention
from almost_eval.models.tensors import check_weights
from almost_eval.progress import Progress
from almost_eval.types import JSONObject
from almost_train.common.batches import BatchPlan, batch_plan, planned_dataset
from almost_train.common.config import option
from almost_train.common.fit import MODEL, fit
from almost_train.common.held_out_loss import ITEMS, HeldOutRows, held_out_figures, refuse_without_rows
from almost_train.common.lora import add_lora, base_dtype, check_lora, quantization, without_dropout
from almost_train.common.merge import training_base
from almost_train.common.processes import is_main, shared_stage
from almost_train.common.seeding import seeded
from almost_train.common.special_text import SKIP_SPECIAL, SpecialText
from almost_train.common.stage import model_input
from almost_train.common.templates import keep_template
from almost_train.common.train_settings import HeldOutSettings
from almost_train.common.trainers import QuietTrainer, check_batches, trainer_arguments
from almost_train.reward.pairs import (
    SKIP_EMPTY,
    RewardPair,
    encode_pairs,
    no_pair,
    pair_metrics,
    plain_pairs,
    read_comparisons,
    reward_encoder,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

KINDS = ("CausalLM", "LMHeadModel", "SequenceClassification", "MaskedLM", "ForPreTraining", "Model")
"""What a reward model can start from: parts of the class name in `config.json`."""

_NEW_WEIGHTS = re.compile(r"(?:^|\.)(?:score|classifier|pre_classifier|classification_head|pooler)\.")
"""Weights that a language model lacks and a classifier needs: they start at random, from the seed."""


@dataclass(frozen=True, slots=True)
class RewardSettings(HeldOutSettings):
    """Settings of `train_reward`."""

    weight_decay: float = option(0.1, "AdamW's weight decay", least=0)
    skip_empty: bool = option(False, SKIP_EMPTY)
    skip_special: bool = option(False, SKIP_SPECIAL)
    margin: bool = option(False, "-log sigmoid(difference - the pair's margin); the rows must have a margin each")


def train_reward(
    settings: RewardSettings,
    comparisons: Path | str,
    model: str,
    output: Path,
    *,
    eval_comparisons: Path | str | None = None,
    progress: Progress | None = None,
) -> JSONObject:
    """Train a reward model and measure it on held-out pairs.

    Args:
        settings: see `RewardSettings`.
        comparisons: a file or a data set of the hub, in any format of `almost_train.common.formats`.
        model: a causal LM, an encoder or a one-label classifier: a directory, a built-in name or a hub id.
        output: the stage's folder: `model/` (the checkpoint), `eval.jsonl` (a line per held-out pair), `log.jsonl`.
        eval_comparisons: held-out pairs, in place of a share of the prompts; pairs for training on one of their
            prompts are dropped.
        progress: where to show the steps.

    Returns:
        `result.json`, the same in every process of `accelerate launch`.

    Raises:
        InputError: settings, data or model that cannot be used; before any weight is loaded.
        RunError: the loss is not finite.
    """
    progress = progress or Progress()

    # 1. What is refused without weights.
    checkpoint = find_checkpoint(model, architectures=KINDS)
    _refuse_other_labels(checkpoint)
    check_batches(settings)
    check_lora(settings, settings.device)
    data = read_comparisons(comparisons, eval_comparisons, margin=settings.margin, skip_empty=settings.skip_empty)
    inputs = {**data.inputs, "model": model_input(model)}
    with shared_stage(output, "reward", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result

        # 2. Pairs as token ids.
        tokenizer = load_tokenizer(checkpoint)
        if "SequenceClassification" in checkpoint.architecture or checkpoint.brings_head:
            check_weights(checkpoint, "AutoModelForSequenceClassification")
        elif any(part in checkpoint.architecture for part in CAUSAL):  # its output head gives way to a score head
            check_weights(checkpoint, "AutoModelForCausalLM")
        template = stage.dated(keep_template(tokenizer))
        encode = reward_encoder(tokenizer, template)
        special = SpecialText.of(tokenizer, template)
        set_pad_token(tokenizer)
        limit = _length_limit(settings, checkpoint, tokenizer)
        train, held_out, dropped = data.split(settings.eval_share, settings.seed)
        train, unplain = plain_pairs(train, special, skip=settings.skip_special)
        held_out, eval_unplain = plain_pairs(held_out, special, skip=settings.skip_special)
        train, unusable = encode_pairs(train, encode, limit, tokenizer.pad_token_id)
        held_out, eval_unusable = encode_pairs(held_out, encode, limit, tokenizer.pad_token_id)
        dropped += unusable + unplain
        eval_unusable += eval_unplain
        if not train:
            raise no_pair(comparisons, dropped)
        refuse_without_rows(settings.eval_every, len(held_out), "give --eval-share or --eval-comparisons")
        lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in train]
        plan = batch_plan(lengths, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed)
        measured = None
        if settings.eval_every:
            rows = [{**_row(pair), "weight": 1.0} for pair in held_out]
            measured = HeldOutRows(rows, _held_out_sums, settings.eval_every, settings.micro_batch_size)

        # 3. Training.
        checkpoint = training_base(checkpoint, output, settings, bf16=settings.bf16, whole=True)
        progress.note(
            f"reward: {len(train)} pairs ({data.training.format}), {plan.steps} steps of {settings.batch_size}"
        )
        if repeats := data.repeat_figures():
            told = " and ".join(f"{count} {name.replace('_', ' ')}" for name, count in repeats.items())
            progress.note(f"reward: {comparisons} has {told}, which are trained on as they are")
        fit(
            lambda: _trainer(settings, checkpoint, tokenizer, train, plan, output),
            stage,
            plan.steps,
            progress,
            settings,
            measured,
        )

        # 4. How good it is, through the checkpoint as others will load it.
        metrics: JSONObject = {}
        if is_main():
            rows = _score(output / MODEL, template.now, held_out, settings.device, progress)
            write_rows(output / "eval.jsonl", rows)
            log = read_rows(output / "log.jsonl")
            metrics = {
                "format": data.training.format,
                "train_pairs": len(train),
                "steps": plan.steps,
                "max_length": limit,
                "dropped": dict(sorted(dropped.items())),
                "eval_dropped": dict(sorted(eval_unusable.items())),
                **data.empty_figures(),
                **repeats,
                "loss_last_step": log[-1]["loss"],
                **held_out_figures(log, measured),
                "eval": pair_metrics(rows),
            }
        return stage.finish(metrics, {MODEL: output / MODEL, "eval": output / "eval.jsonl"})


# --- tokens ---


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that ends no text.

    transformers' classifiers of decoder type read a text's score at its rightmost token that is not
    `config.pad_token_id`, whatever the attention mask says (transformers 5.17, `GenericForSequenceClassification`).
    Texts end in EOS: where that is the pad token too, the score would be read one token too early in training, and at
    the right one by vLLM. In its place comes `unk_token`, or else a new token (`_trainer` adds a row for it if there
    is none to spare). Not an ordinary token: as a pad token it would be split off in any text.
    """
    tokens = tokenizer.special_tokens_map
    pad, eos = tokens.get("pad_token"), tokens.get("eos_token")
    if pad is not None and pad != eos:
        return
    unknown = tokens.get("unk_token")
    tokenizer.pad_token = unknown if unknown not in (None, eos, tokens.get("bos_token")) else "<pad>"
    if tokenizer.pad_token_id is None or tokenizer.pad_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"pad_token": "<pad>"})


def _length_limit(settings: RewardSettings, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a text may have: the setting, or less where the model takes less."""
    own = context_length(checkpoint.config, tokenizer)
    if tokenizer.special_tokens_map.get("sep_token"):  # RoBERTa's positions start after its pad id: 512 of 514 count
        own = min(own, tokenizer.model_max_length)
    return min(settings.max_length, own)


# --- the model ---


def _refuse_other_labels(checkpoint: Checkpoint) -> None:
    if "SequenceClassification" not in checkpoint.architecture:
        return
    labels = checkpoint.config.get("num_labels") or len(checkpoint.config.get("id2label") or ()) or 2
    if labels != 1:
        raise ModelError(
            f"{checkpoint.path} is a classifier with {labels} labels; a reward model starts from one with a single "
            "label, or from a language model"
        )


def load_classifier(checkpoint: Checkpoint, settings: RewardSettings) -> PreTrainedModel:
    """The model, its score head from the checkpoint or, where there is none, drawn from the seed.

    Raises:
        ModelError: transformers has no classifier of this architecture, or other weights than the head's are missing.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of the new head
    attention = settled_attention(settings.attention, checkpoint)
    try:
        with seeded(settings.seed):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(checkpoint.path),
                num_labels=1,
                dtype=base_dtype(settings, bf16=settings.bf16),
                quantization_config=quantization(settings),
                use_safetensors=True,
                output_loading_info=True,
                **({} if attention == "auto" else {"attn_implementation": attention}),
            )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"no reward model can be made of {checkpoint.path}: {first:.200}") from None
    lost = [name for name in info.get("missing_keys", ()) if not _NEW_WEIGHTS.search(name)]
    lost += [name for name, *_ in info.get("mismatched_keys", ())]
    if lost:
        raise ModelError(f"{checkpoint.path} lacks {len(lost)} weights of its architecture, first {sorted(lost)[0]!r}")
    # vLLM puts a sigmoid on a classifier's output unless the configuration calls it a regression.
    model.config.problem_type = "regression"
    return model


def _trainer(
    settings: RewardSettings,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[RewardPair],
    plan: BatchPlan,
    output: Path,
) -> Trainer:
    import torch
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class PairTrainer(QuietTrainer, RewardTrainer):
        """TRL's trainer, with a weight for each pair: see `BatchPlan`."""

        def compute_loss(
            self,
            model: torch.nn.Module,
            inputs: dict[str, torch.Tensor],
            return_outputs: bool = False,
            num_items_in_batch: torch.Tensor | int | None = None,
        ) -> torch.Tensor | tuple[torch.Tensor, object]:
            weight = inputs["weight"]  # (B,)
            outputs, margin, losses = _pair_losses(model, inputs)
            loss = (weight * losses).mean()
            with torch.no_grad():
                seen = {"accuracy": (weight * (margin > 0)).mean(), "margin": (weight * margin).mean()}
                for name, value in seen.items():
                    self._metrics["train"][name].append(self.accelerator.gather(value).mean().item())
                self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return (loss, outputs) if return_outputs else loss

    pad = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        columns = {name: torch.tensor([row[name] for row in rows]) for name in ("weight", "margin")}
        return {**pad([{k: v for k, v in row.items() if k not in columns} for row in rows]), **columns}

    model = without_dropout(load_classifier(checkpoint, settings))
    if len(tokenizer) > cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings:
        if settings.lora_rank:
            raise ModelError(
                f"{checkpoint.path} has no row for a pad token, which its tokenizer lacks, and a LoRA leaves the "
                "embedding as it is; add the token and the row to the checkpoint, or train without --lora-rank"
            )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # for the pad token; nothing attends to it
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    trained: Any = model
    if settings.lora_rank:
        trained = add_lora(model, settings, checkpoint.path, kind="SEQ_CLS", seed=settings.seed)
    filler = pairs[0].chosen_ids[-1:]
    return PairTrainer(
        model=trained,
        # The model has none left; TRL's switch would turn off the adapter's too.
        args=RewardConfig(**trainer_arguments(settings, output), disable_dropout=False),
        data_collator=collate,
        train_dataset=planned_dataset(
            list(map(_row, pairs)), {"chosen_ids": filler, "rejected_ids": filler, "margin": 0.0}, plan
        ),
        processing_class=tokenizer,
    )


def _row(pair: RewardPair) -> Row:
    """As the trainer's collator takes it; its `weight` is the plan's."""
    return {"chosen_ids": list(pair.chosen_ids), "rejected_ids": list(pair.rejected_ids), "margin": pair.margin or 0.0}


def _pair_losses(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[object, torch.Tensor, torch.Tensor]:
    """(what the model gives, r_chosen - r_rejected (B,), loss of each pair (B,))."""
    from torch.nn.functional import logsigmoid

    texts = {name: value for name, value in inputs.items() if name not in ("weight", "margin")}
    outputs = model(**texts, use_cache=False)
    chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)  # (B,) each
    margin = chosen - rejected
    return outputs, margin, -logsigmoid(margin - inputs["margin"])


def _held_out_sums(
    trainer: Trainer, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Over the pairs of a batch; see `HeldOutRows`."""
    _, margin, losses = _pair_losses(model, inputs)
    weight = inputs["weight"]
    return {ITEMS: weight.sum(), "loss": losses.sum(), "accuracy": (margin > 0).sum(), "margin": margin.sum()}


# --- how good it is ---


def _score(model: Path, now: str | None, pairs: Sequence[RewardPair], device: str, progress: Progress) -> list[Row]:
    from almost_eval.rewards.hf import HFRewardModel

    if not pairs:
        return []
    scorer = HFRewardModel(str(model), dtype="float32", device=device)
    scorer.template = replace(scorer.template, now=now)  # as the pairs for training were written
    conversations = [conversation for pair in pairs for conversation in (pair.chosen, pair.rejected)]
    rewards: dict[int, float] = {}
    with progress.track("held-out answers", len(conversations)) as advance:
        for index, reward in scorer.stream(conversations):
            rewards[index] = reward
            advance(1)
    rows = []
    for number, pair in enumerate(pairs):
        chosen, rejected = rewards[2 * number], rewards[2 * number + 1]
        row: Row = {"prompt_id": pair.prompt_id, "chosen_reward": chosen, "rejected_reward": rejected}
        rows.append(row | {"chosen_chars": pair.chars(pair.chosen), "rejected_chars": pair.chars(pair.rejected)})
    return rows
