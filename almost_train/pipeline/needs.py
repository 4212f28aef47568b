"""What each stage of a recipe needs: parameters, memory of one device at its fullest moment, tokens that it computes.

A stage that trains runs one update on tensors without content (`meter`), with the longest rows that its settings
allow: reward model and SFT here, the stages that start from SFT's policy in `policy_needs.py`. One that generates is
arithmetic, in `sampling_needs.py`. Several devices:

- `full` sharding (ZeRO stage 3, arXiv 1910.02054, section 5.3; PyTorch's FSDP): weights, gradients and moments of what
  is trained, and a reference, are divided by the devices. Two layers and the largest embedding are whole at a time; a
  policy that samples is whole (`policy_needs.py`), and so is what the main process saves, in the memory of the host.
- `none`: every device holds all, and a bucket of gradients to sum (at most the gradients' size).

4-bit weights: 4.127 bits for a number of a linear layer (QLoRA, arXiv 2305.14314, section 3: double quantisation), and
one layer of them at a time in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from almost_eval.models.checkpoint import CAUSAL
from almost_train.common.lora import LoraSettings, lora_config
from almost_train.common.train_settings import TrainSettings
from almost_train.pipeline.hardware import Devices
from almost_train.pipeline.shapes import load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from almost_train.pipeline.meter import Meter

NF4_BYTES = 4.127 / 8
"""Of a weight in 4 bits."""
WITH_TRL = ("trl.trainer.reward_trainer", "trl.trainer.sft_trainer")
"""With `datasets`, pandas and scikit-learn: 170 MB that PPO and sampling do without."""
PROMPT_TOKENS = 128
"""Tokens of a mined prompt with its template: it has at most 250 characters."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage needs. Bytes are those of one device."""

    stage: str
    model: str
    """The largest, where there are several."""
    parameters: int = 0
    """Of that model."""
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    """At the fullest moment: activations, logits, what an operation holds while it runs."""
    heap: int = 0
    """Of these, in blocks that the heap of a CPU process keeps when they are freed."""
    cache: int = 0
    """Keys and values."""
    runtime: int = 0
    """Of the process itself: libraries and tokenizer on a CPU, the CUDA context on a GPU."""
    trained_tokens: int = 0
    """Read in forward and backward passes, at most."""
    measured_tokens: int = 0
    """Read in forward passes alone, at most: held-out rows, as often as they are measured."""
    generated_tokens: int = 0
    """At most."""
    rows: int = 1
    """Sequences that are generated together."""
    passes: float = 3.0
    """Forward passes that a trained token costs: the backward pass is two, recomputing one."""
    seconds: float | None = None
    elsewhere: bool = False
    """An endpoint's model generates: its memory and time are no matter of these devices."""
    note: str = ""

    @property
    def total(self) -> int:
        """Bytes at the fullest moment of one device."""
        parts = self.weights + self.gradients + self.optimiser + self.activations + self.cache
        return parts + self.runtime


@dataclass(slots=True)
class Estimator:
    """Needs of stages on some devices."""

    devices: Devices
    configs: dict[str, PretrainedConfig] = field(default_factory=dict)

    def config(self, model: str) -> PretrainedConfig:
        """Of a model, read once."""
        if model not in self.configs:
            self.configs[model] = load_config(model)
        return self.configs[model]

    # --- stages that train ---

    def reward(self, stage: str, model: str, settings: TrainSettings, pairs: int) -> Need:
        """The reward model: chosen and rejected of a pair in one batch."""
        from transformers import AutoModelForSequenceClassification

        micro = self.micro(settings)
        length = self.length(model, settings)

        def step(meter: Meter) -> tuple[list[Any], Callable[[], None]]:
            import torch

            whole = self.built(AutoModelForSequenceClassification, model, settings, "SEQ_CLS", id2label={0: "reward"})
            whole.config.pad_token_id = whole.config.get_text_config().pad_token_id = 0

            def update() -> None:
                with autocast(settings.bf16):
                    logits = whole(**inputs(2 * micro, length), use_cache=False).logits.float()
                torch.nn.functional.logsigmoid(logits[:micro] - logits[micro:]).mean().backward()

            return [whole], update

        need = self.trained(stage, model, settings, step, updated=settings.batch_size, micro=micro)
        return replace(need, **row_tokens(settings, pairs, 2 * length))

    def sft(self, stage: str, model: str, settings: TrainSettings, answers: int) -> Need:
        """SFT with TRL's head, which makes the logits of some tokens at a time."""
        from transformers import AutoModelForCausalLM
        from trl.trainer.utils import add_fused_lm_head

        micro = self.micro(settings)
        length = self.length(model, settings)

        def step(meter: Meter) -> tuple[list[Any], Callable[[], None]]:
            def with_head(base: Any) -> None:
                add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))

            whole = self.built(AutoModelForCausalLM, model, settings, "CAUSAL_LM", prepare=with_head)

            def update() -> None:
                texts = inputs(micro, length)
                with autocast(settings.bf16):
                    output = whole(**texts, labels=texts["input_ids"], fused_lm_head=True, use_cache=False)
                (-output.log_probs.sum()).backward()

            return [whole], update

        need = self.trained(stage, model, settings, step, updated=settings.batch_size, micro=micro)
        return replace(need, **row_tokens(settings, answers, length))

    # --- parts ---

    def micro(self, settings: TrainSettings) -> int:
        """Items of one forward pass on a device."""
        return min(settings.micro_batch_size, max(1, settings.batch_size // self.devices.count))

    def length(self, model: str, settings: TrainSettings) -> int:
        """Tokens of the longest text: what the settings allow, and the model reads."""
        most = getattr(self.config(model).get_text_config(), "max_position_embeddings", None)
        return min(settings.max_length, most or settings.max_length)

    def count(self, model: str) -> int:
        """Parameters of a language model; of another one, an encoder or a classifier, without its head."""
        from transformers import AutoModel, AutoModelForCausalLM

        from almost_train.pipeline.meter import count, measured

        config = self.config(model)
        kinds = getattr(config, "architectures", None) or ["CausalLM"]  # published sizes name none
        is_causal = any(part in kind for part in CAUSAL for kind in kinds)
        with measured():
            return count(from_config(AutoModelForCausalLM if is_causal else AutoModel, config))

    def built(
        self,
        kind: Any,
        model: str,
        settings: LoraSettings,
        task: str,
        *,
        prepare: Callable[[Any], None] | None = None,
        **changes: object,
    ) -> Any:
        """A model without content, with an adapter where the settings ask for one; in training mode."""
        import torch

        config = self.config(model).__class__.from_dict({**self.config(model).to_dict(), **changes})
        bf16 = getattr(settings, "bf16", False)
        held = torch.bfloat16 if settings.lora_rank and (bf16 or settings.is_quantized) else torch.float32
        whole = from_config(kind, config, held)
        if prepare:
            prepare(whole)
        if settings.lora_rank:
            from peft import get_peft_model

            whole = get_peft_model(whole, lora_config(settings, task))
        if getattr(settings, "gradient_checkpointing", False):
            base = whole.get_base_model() if settings.lora_rank else whole
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if settings.lora_rank:
                base.enable_input_require_grads()
        return whole.train()

    def trained(
        self,
        stage: str,
        model: str,
        settings: Any,
        step: Callable[[Meter], tuple[list[Any], Callable[[], None]]],
        *,
        updated: int,
        micro: int,
        whole: Callable[[], int] = lambda: 0,
        moments_saved: bool = False,
    ) -> Need:
        """The memory of an update.

        Args:
            stage: its name.
            model: that is trained.
            settings: of the stage.
            step: makes models that are trained, and the forward and backward pass of a micro-batch.
            updated: items of one update, over all devices.
            micro: items of that pass.
            whole: bytes of a model that every device holds whole; read after `step`.
            moments_saved: whether what is saved whole has the optimiser's moments too.
        """
        from almost_train.pipeline.meter import MAPPED, count, measured, optimiser_size, size_of, step_peak

        micro_batches = max(1, updated // (micro * self.devices.count))
        with measured() as meter:
            models, update = step(meter)
            base, trained = count(models[0]), sum(count(one, trained=True) for one in models)
            weights = meter.live
            gradients = size_of(*models, trained=True)
            saved, spare = _quantized(models) if settings.is_quantized else (0, 0)
            optim = getattr(settings, "optim", "adamw_torch")
            optimiser = optimiser_size(*models, optim=optim)
            on_gpu = self.devices.on_gpu
            peak, mapped = step_peak(meter, models, update, micro_batches=micro_batches, on_gpu=on_gpu, optim=optim)
            layer = max((_largest_layer(one) for one in models), default=0)
            mapped = max(0, mapped - size_of(*models, trained=True, least=MAPPED))  # those are gradients
            saved_whole = size_of(models[0])
            if moments_saved:
                saved_whole += size_of(models[0], trained=True) + optimiser_size(models[0], optim=optim)
            del models, update
        activations = max(0, peak - weights - gradients - optimiser)
        if peak < weights + gradients + optimiser:  # gradients and moments are small beside the activations
            gradients = max(0, peak - weights - optimiser)
        heap = max(0, activations - mapped)
        shares = self.devices.count if self.devices.sharding == "full" else 1
        undivided = whole() if shares > 1 else 0  # the reward model is whole everywhere
        if shares > 1:
            activations += 2 * layer
            if not on_gpu:  # on GPUs it is gathered in the host's memory
                activations = max(activations, saved_whole - gradients // shares)
        elif self.devices.count > 1:
            activations += gradients  # the buckets
        recompute = 1 if settings.gradient_checkpointing else 0
        return Need(
            stage,
            model,
            parameters=base,
            trained=trained,
            weights=(weights - undivided) // shares + undivided - saved,
            gradients=gradients // shares,
            optimiser=optimiser // shares,
            activations=activations + spare,
            heap=heap,
            runtime=self.devices.runtime(model, *WITH_TRL),
            passes=(2 if settings.lora_rank else 3) + recompute,
        )


def row_tokens(settings: TrainSettings, rows: int, length: int) -> dict[str, Any]:
    """`trained_tokens` and `measured_tokens` of a training on rows of so many tokens, a share of them held out."""
    share, every = getattr(settings, "eval_share", 0.0), getattr(settings, "eval_every", 0)
    held_out = max(round(share * rows), 1 if share and rows > 1 else 0)
    trained = (rows - held_out) * settings.epochs
    steps = settings.epochs * math.ceil((rows - held_out) / settings.batch_size)
    if (most := getattr(settings, "max_steps", None)) is not None:
        steps, trained = min(steps, most), min(trained, most * settings.batch_size)
    # The last step is measured in any case.
    times = 1 + (steps - 1) // every if every and steps else 1
    return {"trained_tokens": trained * length, "measured_tokens": held_out * times * length}


def from_config(kind: Any, config: PretrainedConfig, dtype: Any = "float32") -> Any:
    """A model of a class of transformers, without content inside `meter.measured`."""
    settings = config.get_text_config().to_dict()
    caps = any(value for name, value in settings.items() if "att" in name and "softcap" in name)
    return kind.from_config(config, dtype=dtype, attn_implementation="eager" if caps else "sdpa")


def autocast(bf16: bool) -> Any:
    """As the trainers compute with and without `bf16`."""
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


def inputs(rows: int, length: int) -> dict[str, Any]:
    """(rows, length) token ids and their mask."""
    import torch

    ids = torch.zeros((rows, length), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _quantized(models: list[Any]) -> tuple[int, int]:
    """(bytes that 4 bits save, bytes of the largest layer of them in bfloat16)."""
    from torch import nn

    saved, largest = 0, 0
    for model in models:
        for name, module in model.named_modules():
            frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad and "lora_" not in name
            if frozen and not name.endswith(("lm_head", "score")):
                saved += int(module.weight.numel() * (module.weight.element_size() - NF4_BYTES))
                largest = max(largest, 2 * module.weight.numel())
    return saved, largest


def _largest_layer(model: Any) -> int:
    """Bytes of what FSDP gathers at once: a layer, or the embedding."""
    from torch import nn

    sizes = [0]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            sizes += [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in module]
        elif isinstance(module, nn.Embedding):
            sizes.append(module.weight.numel() * module.weight.element_size())
    return max(sizes)
