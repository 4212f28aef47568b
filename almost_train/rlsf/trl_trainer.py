"""TRL's trainer of RLOO or GRPO, set up for a job: settings, models, prompts in our order, sampling as PPO's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback

from almost_eval.errors import TemplateError
from almost_eval.files import Row
from almost_eval.models.chat import special_tokens
from almost_eval.types import JSONObject
from almost_train.common.interrupts import SaveRequests
from almost_train.common.lora import (
    base_dtype,
    check_layers,
    layers_named,
    lora_config,
    quantization,
    ready_for_lora,
    set_lora_dropout,
    settle_config,
    train_in_float32,
)
from almost_train.common.processes import check_together
from almost_train.common.schedule import learning_rate_factor
from almost_train.common.trainers import QuietTrainer, joined, resume_on_cpu
from almost_train.rlsf.job import Job
from almost_train.rlsf.log import StepLog
from almost_train.rlsf.models import load_policy
from almost_train.rlsf.rollouts import batch_prompts, end_ids, sample, uniforms
from almost_train.rlsf.trl_watch import PolicyWatch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer


def make_trainer(
    job: Job, log: StepLog, advance: Callable[[int], None], saving: SaveRequests
) -> tuple[Trainer, PolicyWatch]:
    """The trainer, and what watches it."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    settings = job.settings
    # 1. Settings under TRL's names. Those whose default in TRL differs from ours are set too.
    arguments: JSONObject = {
        "output_dir": str(job.work),
        "max_steps": settings.steps + 1,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // (settings.micro_batch_size * job.processes),
        "num_generations": settings.num_generations,
        "num_iterations": 1,
        "shuffle_dataset": False,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "beta": settings.kl_coefficient,
        "epsilon": settings.clip,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "disable_dropout": not settings.lora_dropout,  # the policy has none of its own
        "ddp_find_unused_parameters": False,
        **joined(settings.device),
        "dataloader_pin_memory": torch.cuda.is_available(),  # without an accelerator torch warns of it
        "seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "save_total_limit": settings.guard_window // settings.save_every + 3,  # as far back as a guard may go
        "report_to": "none",
        "disable_tqdm": True,
    }
    if settings.algorithm == "rloo":
        arguments["normalize_advantages"] = settings.whiten_advantages
    else:
        arguments["loss_type"] = settings.loss_type
        # Dr. GRPO's second half: a prompt whose completions are rewarded alike counts no more than another.
        arguments["scale_rewards"] = "none" if settings.loss_type == "dr_grpo" else "group"
    config, trainer_class = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[settings.algorithm]
    # 2. Models and data. TRL pads, and so changes the tokenizer: it gets a copy.
    _ = job.reward.model  # loaded before TRL's set-up, under which DeepSpeed would spread it over the processes
    policy = load_policy(job.policy, "cpu", base_dtype(settings, bf16=settings.bf16), quantization(settings))
    watch = PolicyWatch(job, log, advance, saving, frozenset(end_ids(policy, job.tokenizer)))

    class PolicyTrainer(QuietTrainer, _with_own_sampling(trainer_class, job)):  # type: ignore[misc]
        """TRL's, with our learning rate. The adapter's dropout is for updates alone, not for samples."""

        def _generate_and_score_completions(self, inputs: list[Row]) -> JSONObject:
            set_lora_dropout(self.model, active=False)
            batch: JSONObject = super()._generate_and_score_completions(inputs)
            set_lora_dropout(self.model, active=True)
            return batch

    if settings.lora_rank:
        check_layers(policy, settings)
    with layers_named(settings):
        trainer = PolicyTrainer(
            model=ready_for_lora(policy, settings),
            reward_funcs=watch.reward,
            args=config(**arguments),
            train_dataset=_dataset(job),
            processing_class=copy.deepcopy(job.tokenizer),
            callbacks=[watch],
            # TRL puts it on: with an adapter of its own making, its reference is the base with the adapter off.
            peft_config=lora_config(settings, "CAUSAL_LM") if settings.lora_rank else None,
        )
    trainer.rate_factor = lambda step: (
        learning_rate_factor(step, settings.steps, settings.warmup_ratio, settings.schedule)
        if step < settings.steps
        else 0.0
    )
    if settings.lora_rank:
        settle_config(trainer.model, job.policy.path)
    if settings.is_quantized:
        train_in_float32(trainer.model)
    check_together(trainer.accelerator)
    resume_on_cpu(trainer)
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    return trainer, watch


def _with_own_sampling(trainer_class: Any, job: Job) -> Any:
    """TRL's trainer, its completions sampled as PPO's are.

    Its own sampling draws from a generator of each process, so what is sampled would depend on their number.
    """
    from trl.models.utils import unwrap_model_for_generation

    own, settings = trainer_class._generate_single_turn, job.settings

    class SeededCompletions(trainer_class):
        """One method of TRL's trainer in another way."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **options: Any) -> Any:
            if not self.model.training or self.use_vllm:
                return own(self, prompt_ids, *rest, **options)
            first = self.accelerator.process_index * len(prompt_ids)
            rows = range(first, first + len(prompt_ids))  # of the step's batch, over all processes
            with unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy:
                completions = sample(
                    policy,
                    job.tokenizer,
                    [tuple(ids) for ids in prompt_ids],
                    uniforms(settings.seed, self.state.global_step, rows, settings.max_new_tokens),
                    temperature=settings.temperature,
                    stop=settings.stop,
                    max_rows=len(prompt_ids),
                )
            ids = [list(completion.token_ids) for completion in completions]
            return ids if settings.algorithm == "rloo" else (ids, None)  # GRPO's has vLLM's log-probabilities too

    return SeededCompletions


def _dataset(job: Job) -> Dataset:
    """The prompts of all steps in our order, as one epoch: in a second, TRL's own order would not resume as it was."""
    from datasets import Dataset

    bos, texts = special_tokens(job.tokenizer).get("bos_token", ""), {}
    for prompt in job.prompts:
        # TRL lets the tokenizer add its BOS, also where the template has written one.
        forms = (prompt.rendered, prompt.rendered.lstrip().removeprefix(bos))
        text = next((f for f in forms if tuple(job.tokenizer(text=f)["input_ids"]) == prompt.token_ids), None)
        if text is None:
            raise TemplateError(
                f"TRL would give the policy other tokens for prompt {prompt.id} than the chat template does (the "
                "tokenizer adds BOS or EOS in its own way); use --algorithm ppo"
            )
        texts[prompt.token_ids] = text
    size = job.settings.batch_size // job.settings.num_generations
    return Dataset.from_list(
        [
            {"prompt": texts[prompt.token_ids], "id": prompt.id}
            for step in range(job.settings.steps + 1)
            for prompt in batch_prompts(job.prompts, job.settings.seed, step, size)
        ]
    )
