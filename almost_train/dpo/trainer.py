"""What offline and online DPO share: settings, rows of pairs as tensors, TRL's DPOTrainer with our weights and order.

Departures from how TRL's trainer is usually driven:

- Pairs come as token ids: an answer ends in EOS, nothing is cut, and what is too long has been counted.
- Each pair has a weight (`BatchPlan`), so that a batch gives one gradient, however it is divided.
- Only the last answer of a dialogue counts, where a pair differs in earlier turns too.
- The reference is the model that training starts from: a second copy, or with a LoRA the base with the adapter off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import InputError
from almost_eval.files import Row
from almost_eval.models.checkpoint import Checkpoint
from almost_train.common.batches import NO_LOSS, BatchPlan
from almost_train.common.config import MOST_RATE, option
from almost_train.common.held_out_loss import ITEMS
from almost_train.common.lora import add_lora, without_dropout
from almost_train.common.policy import load_causal_lm, stop_at_eos
from almost_train.common.train_settings import TrainSettings
from almost_train.common.trainers import QuietTrainer, trainer_arguments
from almost_train.dpo.loss import LOSSES, preference_loss
from almost_train.sft.run import TrainingRow

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Inputs = dict[str, "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class PreferenceSettings(TrainSettings):
    """What both kinds of DPO take."""

    learning_rate: float = option(1e-6, "peak learning rate of AdamW", above=0, most=MOST_RATE)
    batch_size: int = option(64, "pairs of one optimiser step, over all devices", least=1)
    max_steps: int | None = option(None, "at most so many optimiser steps", least=1)
    beta: float = option(0.1, "how much a nat away from the reference counts", above=0)
    loss: str = option("sigmoid", "DPO's own, or IPO's", choices=LOSSES)
    label_smoothing: float = option(0.0, "share of pairs taken to be labelled wrongly (sigmoid)", least=0, most=0.5)


def check_loss(settings: PreferenceSettings) -> None:
    """Raise InputError for label smoothing with a loss that has none."""
    if settings.label_smoothing and settings.loss != "sigmoid":
        raise InputError(f"--label-smoothing belongs to the loss sigmoid, not to {settings.loss}; leave it out")


def shortened(plan: BatchPlan, batch_size: int, most: int | None) -> BatchPlan:
    """The first `most` steps of a plan; all of it where that is None."""
    steps = min(plan.steps, most or plan.steps)
    items = steps * batch_size
    return BatchPlan(plan.order[:items], plan.weights[:items], steps)


# --- pairs as tensors ---


def pair_row(chosen: TrainingRow, rejected: TrainingRow) -> Row:
    """One pair, as `collate_pairs` takes it."""
    return {
        "chosen_ids": list(chosen.input_ids),
        "chosen_labels": list(chosen.labels),
        "rejected_ids": list(rejected.input_ids),
        "rejected_labels": list(rejected.labels),
    }


def pair_collator(pad_token_id: int) -> Callable[[Sequence[Row]], Inputs]:
    """Rows of pairs -> `input_ids`, `attention_mask`, `completion_mask`, each (2B, T), chosen first; `weight` (B,)."""

    def collate(rows: Sequence[Row]) -> Inputs:
        import torch

        sides = [(row[f"{side}_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected") for row in rows]
        shape = (len(sides), max(len(ids) for ids, _ in sides))
        ids = torch.full(shape, pad_token_id)
        attention, completion = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for at, (tokens, labels) in enumerate(sides):
            ids[at, : len(tokens)] = torch.tensor(tokens)
            attention[at, : len(tokens)] = 1
            completion[at, : len(tokens)] = torch.tensor(labels) != NO_LOSS
        weight = torch.tensor([float(row["weight"]) for row in rows])
        return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion, "weight": weight}

    return collate


# --- the trainer ---


def preference_trainer_class() -> Any:
    """TRL's DPOTrainer, as the head of this file says. A class made here: TRL is slow to import."""
    import torch
    from trl import DPOTrainer

    class PreferenceTrainer(QuietTrainer, DPOTrainer):
        """See the head of the file."""

        preference: PreferenceSettings

        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset  # token ids already

        def log_ratios(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            """(chosen, rejected), (B,) each: log p of the answer by the model less that by the reference, nats."""
            texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
            labels = texts["input_ids"].masked_fill(texts["completion_mask"] == 0, NO_LOSS)
            outputs = model(
                input_ids=texts["input_ids"],
                attention_mask=texts["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,  # TRL's: the logits (2B, T, V) are never held at once
            )
            chosen, rejected = outputs.log_probs.float().sum(1).chunk(2)  # (B,) each
            reference = self.compute_ref_log_probs(self.ref_model or self.model, texts)
            return chosen - reference[0].float(), rejected - reference[1].float()

        def pair_losses(self, ratios: tuple[Tensor, Tensor]) -> Tensor:
            """Loss of each pair (B,)."""
            own = self.preference
            return preference_loss(*ratios, beta=own.beta, loss=own.loss, label_smoothing=own.label_smoothing)

        def compute_loss(
            self,
            model: nn.Module,
            inputs: Inputs,
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor | tuple[Tensor, object]:
            weight = inputs["weight"]  # (B,)
            chosen, rejected = ratios = self.log_ratios(model, inputs)
            loss = (weight * self.pair_losses(ratios)).mean()
            with torch.no_grad():
                seen = {
                    "margin": weight * self.preference.beta * (chosen - rejected),
                    "chosen_logratio": weight * chosen,
                    "rejected_logratio": weight * rejected,
                }
                if "share" in inputs:  # online: ties too are answers of the policy
                    seen["kl"] = inputs["share"] * (chosen + rejected) / 2
                else:
                    seen["accuracy"] = weight * (chosen > rejected)
                for name, value in seen.items():
                    self._metrics["train"][name].append(self.accelerator.gather(value.mean()).mean().item())
                tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
                self._total_train_tokens += tokens
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return (loss, ratios) if return_outputs else loss

    return PreferenceTrainer


def held_out_sums(trainer: Any, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Over the pairs of a batch; see `HeldOutRows`."""
    chosen, rejected = ratios = trainer.log_ratios(model, inputs)
    return {
        "loss": trainer.pair_losses(ratios).sum(),
        "accuracy": (chosen > rejected).sum(),
        "margin": trainer.preference.beta * (chosen - rejected).sum(),
        ITEMS: inputs["weight"].sum(),
    }


def make_trainer(
    cls: Any,
    settings: PreferenceSettings,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    output: Path,
    collate: Callable[[Sequence[Row]], Any],
) -> Any:
    """A `PreferenceTrainer` or one of its kind, with policy and reference loaded."""
    from trl import DPOConfig

    policy: Any = without_dropout(load_causal_lm(settings, checkpoint))
    stop_at_eos(policy, tokenizer)
    if settings.lora_rank:
        policy = add_lora(policy, settings, checkpoint.path, kind="CAUSAL_LM", seed=settings.seed)
    trainer = cls(
        model=policy,
        ref_model=None if settings.lora_rank else without_dropout(load_causal_lm(settings, checkpoint)),
        args=DPOConfig(
            **trainer_arguments(settings, output),
            beta=settings.beta,
            disable_dropout=False,  # the models have none left; TRL would turn off the adapter's too
            router_aux_loss_coef=0.0,
        ),
        data_collator=collate,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.preference = settings
    if settings.lora_rank:
        trainer.model.delete_adapter("ref")  # TRL's copy of the new adapter; the reference is the base without any
    return trainer
