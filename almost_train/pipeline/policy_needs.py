"""What the stages that start from SFT's policy need: RLSF, DPO on comparisons, online DPO.

Beside the policy they hold what it is compared with: a reference (a second copy, or with a LoRA the base with the
adapter off, which is none) and, where answers are judged, the reward model, whole on every device.
A policy whose weights are divided is whole on every device while it samples: `rlsf.sharding.FSDP.whole`, and TRL's
`ds3_gather_for_generation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from almost_train.common.lora import LoraSettings
from almost_train.dpo.loss import preference_loss
from almost_train.dpo.online import OnlineDPOSettings
from almost_train.dpo.trainer import PreferenceSettings
from almost_train.pipeline.needs import (
    NF4_BYTES,
    PROMPT_TOKENS,
    WITH_TRL,
    Estimator,
    Need,
    autocast,
    from_config,
    inputs,
    row_tokens,
)
from almost_train.pipeline.sampling_needs import VLLM_PASS, VLLM_SHARE
from almost_train.pipeline.shapes import cache_bytes
from almost_train.rlsf.job import RLSFSettings

if TYPE_CHECKING:
    from almost_train.pipeline.meter import Meter

WITH_VLLM = "trl.trainer.rloo_trainer"
"""TRL's trainers of RLOO and GRPO import vLLM where it is installed, whatever samples: 180 MB on a CPU."""
CPU_CACHE = 1 << 30
"""Bytes of keys and values that vLLM gets on a CPU, where it would take all of the memory."""
HEAP_BETWEEN, HEAP_BETWEEN_LORA = 2, 3.5
"""Times an update's `Need.heap` that the heap of an old glibc holds where sampling comes between: PPO on SmolLM2
held 2.3 times the activations, with LoRA 2.7 to 4.1 times in eleven runs (benchmarks/LOG.md)."""
Update = Callable[[], None]
"""The forward and backward pass of a micro-batch."""


def rlsf_need(estimator: Estimator, stage: str, policy: str, reward: str, settings: RLSFSettings) -> Need:
    """PPO trains a policy and a value model of the reward model's size; RLOO and GRPO the policy alone."""
    from transformers import AutoModel, AutoModelForCausalLM

    from almost_train.rlsf.rollouts import completion_logprobs

    is_ppo = settings.algorithm == "ppo"
    width, micro = settings.max_new_tokens, settings.micro_batch_size
    judged = 0
    """Bytes of the reward model."""

    def step(meter: Meter) -> tuple[list[Any], Update]:
        nonlocal judged
        judge, judged = _judge(estimator, meter, reward, settings.reward_dtype)
        reference = None if settings.lora_rank else estimator.built(AutoModelForCausalLM, policy, LoraSettings(), "")
        kept = [judge, reference]  # in memory as long as `update` is
        model = estimator.built(AutoModelForCausalLM, policy, settings, "CAUSAL_LM")
        value = estimator.built(AutoModel, reward, settings, "FEATURE_EXTRACTION") if is_ppo else None

        def update() -> None:
            assert kept
            ids, mask = inputs(micro, PROMPT_TOKENS + width).values()
            with autocast(settings.bf16):
                logprobs = completion_logprobs(model, ids, mask, width, settings.temperature)
            logprobs.sum().backward()
            if value is not None:
                with autocast(settings.bf16):
                    states = value(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                states.float().sum().backward()

        return [model, value] if value is not None else [model], update

    mapped = 0 if is_ppo else _mapped(estimator, reward, settings.reward_dtype)
    updated = settings.mini_batch_size if is_ppo else settings.batch_size
    need = estimator.trained(
        stage, policy, settings, step, updated=updated, micro=micro, whole=lambda: judged, moments_saved=is_ppo
    )
    here = settings.batch_size // estimator.devices.count
    rows = min(settings.sampling_batch_size, here) if is_ppo else here
    if settings.sampler == "vllm":
        need = _and_vllm(estimator, need, settings)
    elif settings.sampler == "vllm-server":
        need = replace(need, rows=here, note="the vLLM server's devices are others, and not planned here")
    else:
        need = _or_sampling(
            estimator, need, rows, width, bf16=settings.bf16, gathered=_gathered(estimator, need, settings)
        )
    libraries = (*WITH_TRL, WITH_VLLM) if not is_ppo or settings.sampler == "vllm" else ()
    need = replace(need, runtime=estimator.devices.runtime(policy, *libraries))
    tokens = settings.batch_size * settings.steps
    epochs = settings.ppo_epochs if is_ppo else 1
    between = HEAP_BETWEEN_LORA if is_ppo and settings.lora_rank else HEAP_BETWEEN
    kept = int((between - 1) * min(need.heap, need.activations)) if estimator.devices.old_heap else 0
    # The update, twice the models in PPO; and what measures: policy, reference, reward model, value.
    return replace(
        need,
        weights=need.weights - mapped,
        activations=need.activations + kept,
        trained_tokens=tokens * (PROMPT_TOKENS + width) * (epochs * (2 if is_ppo else 1) + 1),
        generated_tokens=tokens * width,
    )


def dpo_need(estimator: Estimator, stage: str, policy: str, settings: PreferenceSettings, pairs: int) -> Need:
    """DPO on comparisons: chosen and rejected of a pair in one batch, read by the policy and by the reference."""
    length = estimator.length(policy, settings)
    need = _preference_update(estimator, stage, policy, settings, length)
    return replace(need, **row_tokens(settings, pairs, 2 * length))


def online_dpo_need(
    estimator: Estimator, stage: str, policy: str, reward: str, settings: OnlineDPOSettings, prompts: int
) -> Need:
    """DPO on pairs that the policy writes before each update, judged by the reward model.

    It refuses FSDP and DeepSpeed: every device holds all of it.
    """
    length = min(PROMPT_TOKENS + settings.max_new_tokens, estimator.length(policy, settings))
    devices = replace(estimator.devices, sharding="none")
    need = _preference_update(Estimator(devices, estimator.configs), stage, policy, settings, length, reward)
    here = max(1, settings.batch_size // devices.count)
    rows = min(settings.sampling_batch_size, 2 * here)
    need = _or_sampling(estimator, need, rows, settings.max_new_tokens, bf16=settings.bf16)
    tokens = row_tokens(settings, prompts, 2 * length)
    # The reward model reads every answer once.
    answers = tokens["trained_tokens"] // length
    return replace(
        need,
        weights=need.weights - _mapped(estimator, reward),
        trained_tokens=answers * length,
        measured_tokens=answers * length,
        generated_tokens=answers * settings.max_new_tokens,
        note="it is not divided: every device holds all of it" if estimator.devices.count > 1 else "",
    )


# --- parts ---


def _preference_update(
    estimator: Estimator, stage: str, policy: str, settings: PreferenceSettings, length: int, reward: str = ""
) -> Need:
    """The update that both kinds of DPO make, by TRL's trainer; with a reward model beside it."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    micro = estimator.micro(settings)

    def with_head(base: Any) -> None:
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))

    def step(meter: Meter) -> tuple[list[Any], Update]:
        judge = _judge(estimator, meter, reward, "auto") if reward else None
        reference = None
        if not settings.lora_rank:
            reference = estimator.built(
                AutoModelForCausalLM, policy, LoraSettings(), "", prepare=lambda base: add_fused_lm_head(base)
            )
        model = estimator.built(AutoModelForCausalLM, policy, settings, "CAUSAL_LM", prepare=with_head)
        kept = [judge]  # in memory as long as `update` is

        def update() -> None:
            assert kept
            texts = inputs(2 * micro, length)  # (2B, T), chosen first
            texts["labels"] = texts["input_ids"]
            with autocast(settings.bf16):
                chosen, rejected = model(**texts, fused_lm_head=True, use_cache=False).log_probs.float().sum(1).chunk(2)
                # The policy's activations stay while the reference reads the same.
                with torch.no_grad(), model.disable_adapter() if reference is None else torch.no_grad():
                    beside = (reference or model)(**texts, fused_lm_head=True, use_cache=False).log_probs
                first, second = beside.float().sum(1).chunk(2)
                loss = preference_loss(chosen - first, rejected - second, beta=settings.beta, loss=settings.loss)
            loss.mean().backward()

        return [model], update

    need = estimator.trained(stage, policy, settings, step, updated=settings.batch_size, micro=micro)
    return replace(need, passes=need.passes + 1)  # the reference's


def _judge(estimator: Estimator, meter: Meter, reward: str, dtype: str) -> tuple[Any, int]:
    """The reward model, and its bytes. As the stage `reward` saves it, in float32, unless told otherwise."""
    from transformers import AutoModel

    before = meter.live
    judge = from_config(AutoModel, estimator.config(reward), "bfloat16" if dtype == "bfloat16" else "float32")
    return judge, meter.live - before


def _mapped(estimator: Estimator, reward: str, dtype: str = "auto") -> int:
    """Bytes of the reward model that stay in its file: a CPU maps the weights as they are stored, and of the embedding
    only the rows that texts have are ever read. 640 MiB of Gemma 3 270M; PPO copies them for its value model.
    """
    if estimator.devices.on_gpu or dtype == "bfloat16":
        return 0
    text = estimator.config(reward).get_text_config()
    return int(4 * text.vocab_size * text.hidden_size)


def _and_vllm(estimator: Estimator, need: Need, settings: RLSFSettings) -> Need:
    """With vLLM in the same process: weights of its own, keys and values. It holds them beside the update, or, where it
    sleeps, in the place of gradients and activations.
    """
    devices, config = estimator.devices, estimator.config(need.model)
    number = 2 if settings.bf16 else 4
    weights = estimator.count(need.model) * number
    one = cache_bytes(config, PROMPT_TOKENS + settings.max_new_tokens, number)
    if devices.on_gpu:
        share = settings.sampler_memory or VLLM_SHARE
        held = int(share * devices.memory)
        rows = (held - weights - VLLM_PASS) // one
        note = "" if rows > 0 else f"vLLM's share of {share:g} has no room for one answer"
    else:
        held, note = weights + CPU_CACHE, ""
        rows = CPU_CACHE // one
    if not settings.sampler_sleep:
        need = replace(need, weights=need.weights + weights, cache=max(0, held - weights))
    elif held > need.gradients + need.activations:
        cache = max(0, held - weights)
        need = replace(need, weights=need.weights + weights, cache=cache, gradients=0, activations=0)
    return replace(need, rows=max(1, min(256, rows, settings.batch_size)), note=note)


def _gathered(estimator: Estimator, need: Need, settings: RLSFSettings) -> int:
    """Bytes of the policy that samples, where devices hold shares of it; as it computes, in bfloat16 or float32."""
    devices = estimator.devices
    if devices.count == 1 or devices.sharding != "full":
        return 0
    return int(need.parameters * (NF4_BYTES if settings.is_quantized else 2 if settings.bf16 else 4))


def _or_sampling(estimator: Estimator, need: Need, rows: int, new: int, *, bf16: bool, gathered: int = 0) -> Need:
    """The larger of an update and of sampling so many rows, which comes before the first gradient and between updates:
    it needs keys and values, and the `gathered` bytes of the policy, in the place of gradients and activations.
    """
    number = 2 if bf16 else 4
    config = estimator.config(need.model)
    # transformers makes the keys of a layer anew with each token; the draw is from a cumulative sum in float64.
    layers = config.get_text_config().num_hidden_layers
    cache = cache_bytes(config, rows * (PROMPT_TOKENS + new), number) * (layers + 1) // layers
    draws = rows * config.get_text_config().vocab_size * 36
    if cache + draws + gathered > need.gradients + need.activations:
        need = replace(need, weights=need.weights + gathered, gradients=0, activations=draws, cache=cache)
    return replace(need, rows=rows)
