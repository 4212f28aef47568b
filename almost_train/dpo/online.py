"""Online DPO: before each update the policy answers every prompt of the step twice, and the reward model says which is
better (direct alignment from online feedback, arXiv 2402.04792, with a reward model as the judge).

The update is that of offline DPO, by the same trainer of TRL. The sampling is that of our PPO: a draw depends on the
seed, the step and the place of the prompt in it, so a training that goes on, or that runs in two processes, draws the
same.

TRL has an `OnlineDPOTrainer` among its experimental ones. It is not used (TRL 1.16): gradients are summed over the
micro-batches of a step and not averaged, its KL counts padding, absolute positions count it too, prompts that are too
long are cut, and its draws depend on the batch.

Departures from PPO, RLOO and GRPO here: no guard stops the training; watch `kl` and `length` in `log.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import DataError, InputError
from almost_eval.files import Row, read_rows, write_rows
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.progress import Progress
from almost_eval.types import JSONObject
from almost_train.common.batches import NO_LOSS, BatchPlan, batch_plan
from almost_train.common.config import option
from almost_train.common.fit import MODEL, fit
from almost_train.common.lora import check_lora
from almost_train.common.merge import training_base
from almost_train.common.policy import policy_tokenizer
from almost_train.common.processes import is_main, shared_stage
from almost_train.common.special_text import SKIP_SPECIAL
from almost_train.common.templates import keep_template
from almost_train.common.trainers import check_batches
from almost_train.dpo.trainer import (
    PreferenceSettings,
    check_loss,
    make_trainer,
    pair_collator,
    pair_row,
    preference_trainer_class,
    shortened,
)
from almost_train.rlsf.job import refuse_empty_stop
from almost_train.rlsf.log import first_and_last, refuse_non_finite
from almost_train.rlsf.run import dated_judge, fitting_prompts, plain_prompts, read_inputs
from almost_train.sft.run import TrainingRow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from almost_eval.rewards.hf import HFRewardModel
    from almost_train.rlsf.rollouts import RolloutPrompt, Sampled

SAMPLES = 2
"""Pairs of a step that go to samples.jsonl."""


@dataclass(frozen=True, slots=True)
class OnlineDPOSettings(PreferenceSettings):
    """Settings of `train_online_dpo`."""

    epochs: int = option(1, "passes over the prompts, each of which is answered twice", least=1)
    max_length: int = option(
        1024, "longest prompt with max_new_tokens, tokens; longer ones are dropped and counted", least=8
    )
    max_new_tokens: int = option(256, "longest answer, tokens", least=1)
    temperature: float = option(1.0, "of the sampling", above=0)
    stop: tuple[str, ...] = option(
        ("\n\nHuman:", "\n\nAssistant:"), "text that ends an answer, besides EOS; it earns the penalty"
    )
    eos_penalty: float = option(1.0, "taken off the reward of an answer without EOS", least=0)
    sampling_batch_size: int = option(32, "answers sampled at once by a process", least=1)
    samples_every: int = option(10, "steps between entries of samples.jsonl", least=1)
    skip_special: bool = option(False, SKIP_SPECIAL)


def train_online_dpo(
    settings: OnlineDPOSettings,
    prompts: Path | str,
    policy: str,
    reward_model: str,
    output: Path,
    *,
    progress: Progress | None = None,
) -> JSONObject:
    """Train a policy on the reward model's choice between two of its own answers.

    Args:
        settings: see `OnlineDPOSettings`.
        prompts: a file or a data set of the hub, in any format of `almost_train.common.formats`.
        policy: the SFT checkpoint: where training starts, and the reference.
        reward_model: a sequence classifier with one label; raw logits.
        output: the stage's folder: `model/`, `log.jsonl` and `samples.jsonl`.
        progress: where to show the steps.

    Returns:
        `result.json`, the same in every process of `accelerate launch`.

    Raises:
        InputError: settings that do not go together, prompts or models that cannot be used.
        RunError: a loss, a gradient or a reward that is not finite.
    """
    progress = progress or Progress()

    # 1. What is refused without weights.
    checkpoint = find_checkpoint(policy)
    reward_checkpoint = find_checkpoint(reward_model, architectures=("SequenceClassification", "RewardModel"))
    check_batches(settings)
    check_loss(settings)
    check_lora(settings, settings.device)
    refuse_empty_stop(settings.stop)
    source, inputs = read_inputs(prompts, policy, reward_model)
    with shared_stage(output, "online_dpo", settings, inputs) as stage:
        if stage.result is not None:
            return stage.result

        # 2. Prompts as token ids.
        tokenizer = policy_tokenizer(checkpoint)
        template = stage.dated(keep_template(tokenizer))
        reward = dated_judge(reward_checkpoint, settings.device, stage)
        plain, others = plain_prompts(source.records, tokenizer, template, skip=settings.skip_special)
        kept, too_long = fitting_prompts(plain, checkpoint, tokenizer, template, reward, settings.max_new_tokens)
        longest = settings.max_length - settings.max_new_tokens
        too_long += [prompt.id for prompt in kept if len(prompt.token_ids) > longest]
        kept = [prompt for prompt in kept if len(prompt.token_ids) <= longest]
        if not kept:
            raise DataError(
                f"none of {len(too_long)} prompts leaves room for max_new_tokens {settings.max_new_tokens} in "
                f"max_length {settings.max_length}"
            )
        lengths = [len(prompt.token_ids) for prompt in kept]
        plan = batch_plan(lengths, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed)
        plan = shortened(plan, settings.batch_size, settings.max_steps)

        # 3. Training.
        checkpoint = training_base(checkpoint, output, settings, bf16=settings.bf16)
        judge = PairJudge(settings, kept, plan, tokenizer, reward, output)
        progress.note(f"online_dpo: {len(kept)} prompts ({source.format}), {plan.steps} steps of {settings.batch_size}")
        fit(lambda: _trainer(judge, checkpoint, output), stage, plan.steps, progress, settings)

        # 4. Figures of the log: means over its first and last tenth.
        metrics: JSONObject = {}
        if is_main():
            log = read_rows(output / "log.jsonl")
            metrics = {
                "format": source.format,
                "prompts": len(kept),
                "prompts_too_long": len(too_long),
                "prompts_too_long_ids": too_long[:20],
                **({"prompts_special": others} if others else {}),
                "steps": plan.steps,
                "answer_tokens": round(sum(row["length"] * 2 * row["pairs"] for row in log)),
                "ties": round(sum(row["ties"] for row in log)),
                **first_and_last(log, ("reward", "reward_margin", "kl", "length", "ended")),
            }
        return stage.finish(metrics, {MODEL: output / MODEL, "samples": output / "samples.jsonl"})


# --- pairs of a step ---


@dataclass(slots=True)
class PairJudge:
    """Writes the pairs of a step: two answers of the policy to each prompt, the one of higher reward chosen."""

    settings: OnlineDPOSettings
    prompts: Sequence[RolloutPrompt]
    plan: BatchPlan
    tokenizer: PreTrainedTokenizerBase
    reward: HFRewardModel
    output: Path
    seen: list[Row] = field(default_factory=list)
    """Of the step that is sampled now: a row for each pair of this process."""

    def pairs(self, model: Any, places: Sequence[int], step: int) -> list[Row]:
        """A row (`pair_row`) for each place in the plan, with its weights.

        `share` is the plan's weight; `weight`, that of the loss, is 0 for a tie too: it says nothing.

        Args:
            model: the policy as it is now.
            places: indices into the plan's order.
            step: how many updates were made.

        Raises:
            RunError: a reward that is not finite.
        """
        from almost_train.rlsf.rollouts import conversation, sample, shorten_for_reward, uniforms

        # 1. Two answers each. Fillers are answered too: every process then samples as many.
        prompts = [self.prompts[self.plan.order[place] or 0] for place in places]
        twice = [prompt for prompt in prompts for _ in range(2)]
        draws = [2 * (place % self.settings.batch_size) + side for place in places for side in range(2)]
        training = model.training
        model.eval()
        answers = sample(
            model,
            self.tokenizer,
            [prompt.token_ids for prompt in twice],
            uniforms(self.settings.seed, step, draws, self.settings.max_new_tokens),
            temperature=self.settings.temperature,
            stop=self.settings.stop,
            max_rows=self.settings.sampling_batch_size,
        )
        model.train(training)

        # 2. Their rewards.
        answers = shorten_for_reward(answers, [prompt.messages for prompt in twice], self.reward, self.tokenizer)
        rewards = self.reward.score(
            [conversation(prompt.messages, answer.text) for prompt, answer in zip(twice, answers, strict=True)]
        )
        refuse_non_finite(step, "reward", rewards)
        scores = [r - self.settings.eos_penalty * (not a.ended) for r, a in zip(rewards, answers, strict=True)]

        # 3. Pairs.
        rows: list[Row] = []
        self.seen = []
        for at, (place, prompt) in enumerate(zip(places, prompts, strict=True)):
            first, second = 2 * at, 2 * at + 1
            better, worse = (second, first) if scores[second] > scores[first] else (first, second)
            share = self.plan.weights[place]
            tie = scores[first] == scores[second]
            chosen, rejected = (self._row(prompt, answers[which]) for which in (better, worse))
            rows.append({**pair_row(chosen, rejected), "share": share, "weight": 0.0 if tie else share})
            if share:
                self.seen.append(
                    {
                        "step": step,
                        "place": place,
                        "id": prompt.id,
                        "prompt": prompt.text,
                        "chosen": answers[better].text,
                        "rejected": answers[worse].text,
                        "rewards": [rewards[better], rewards[worse]],
                        "tokens": [len(answers[better].token_ids), len(answers[worse].token_ids)],
                        "ended": [answers[better].ended, answers[worse].ended],
                        "margin": scores[better] - scores[worse],
                        "tie": tie,
                    }
                )
        return rows

    def figures(self, step: int) -> dict[str, float]:
        """Of all pairs of the step, over all processes; the main one keeps some in `samples.jsonl`."""
        from accelerate.utils import gather_object

        seen: list[Row] = sorted(gather_object(self.seen), key=lambda row: row["place"])
        if is_main() and step % self.settings.samples_every == 0:
            file = self.output / "samples.jsonl"
            earlier = [row for row in read_rows(file) if row["step"] < step] if file.exists() else []
            write_rows(file, [*earlier, *({k: v for k, v in row.items() if k != "place"} for row in seen[:SAMPLES])])
        mean = {name: sum(sum(row[name]) for row in seen) / (2 * len(seen)) for name in ("rewards", "tokens", "ended")}
        return {
            "reward": mean["rewards"],
            "reward_margin": sum(row["margin"] for row in seen) / len(seen),
            "length": mean["tokens"],
            "ended": mean["ended"],
            "ties": sum(row["tie"] for row in seen),
            "pairs": len(seen),
        }

    @staticmethod
    def _row(prompt: RolloutPrompt, answer: Sampled) -> TrainingRow:
        read, written = list(prompt.token_ids), list(answer.token_ids)
        return TrainingRow(read + written, [NO_LOSS] * len(read) + written)


def _trainer(judge: PairJudge, checkpoint: Checkpoint, output: Path) -> Any:
    import torch
    from datasets import Dataset

    collate = pair_collator(int(judge.tokenizer.pad_token_id or 0))

    class OnlineTrainer(preference_trainer_class()):  # type: ignore[misc]  # made there: TRL is slow to import
        """Takes places in the plan, and makes pairs of them with the policy as it is at that step."""

        def get_batch_samples(
            self, epoch_iterator: Any, num_batches: int, device: torch.device
        ) -> tuple[list[dict[str, torch.Tensor]], None]:
            """The Trainer calls it before each update for the micro-batches of that update."""
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            sizes = [len(batch["place"]) for batch in batches]
            places = [int(place) for batch in batches for place in batch["place"].tolist()]
            step = self.state.global_step
            rows = judge.pairs(self.accelerator.unwrap_model(self.model), places, step)
            for name, value in judge.figures(step).items():
                self._metrics["train"][name] = [value]
            micro, at = [], 0
            for size in sizes:
                some, at = rows[at : at + size], at + size
                share = torch.tensor([row["share"] for row in some])
                micro.append({**collate(some), "share": share})
            return micro, None

    def collate_places(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return {"place": torch.tensor([row["place"] for row in rows])}

    trainer = make_trainer(
        OnlineTrainer,
        judge.settings,
        checkpoint,
        judge.tokenizer,
        Dataset.from_dict({"place": list(range(len(judge.plan.order)))}),
        output,
        collate_places,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "online DPO samples from whole weights; run it without FSDP and DeepSpeed (--lora-rank is for size)"
        )
    return trainer
