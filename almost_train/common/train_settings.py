"""The settings that every trainer of reward models and policies takes, but for RLSF's.

Those that some machines cannot follow are refused in one line, before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from almost_eval.errors import InputError
from almost_eval.models.loading import ATTENTION, pick_device
from almost_train.common.config import MOST_RATE, MOST_SEED, option
from almost_train.common.lora import LoraSettings

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor")
"""Of transformers' names. Those in 8 bits are bitsandbytes' own, which hold two bytes a weight in place of eight."""


@dataclass(frozen=True, slots=True)
class TrainSettings(LoraSettings):
    """What every trainer takes; the defaults differ between them."""

    learning_rate: float = option(2e-5, "peak learning rate of AdamW", above=0, most=MOST_RATE)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    warmup_share: float = option(
        0.03, "share of the steps, rounded up, in which the rate rises; then it falls as a cosine", least=0, most=1
    )
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    epochs: int = option(1, "passes over the data", least=1)
    max_length: int = option(1024, "longest text, tokens; longer ones are dropped and counted, never cut", least=8)
    batch_size: int = option(128, "items of one optimiser step, over all devices", least=1)
    micro_batch_size: int = option(8, "items of one forward pass on one device", least=1)
    seed: int = option(0, "of the order of the data, of new weights and of dropout", least=0, most=MOST_SEED)
    bf16: bool = option(False, "compute in bfloat16; the weights stay float32")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    optim: str = option("adamw_torch", "the optimiser; those in 8 bits need a GPU", choices=OPTIMIZERS)
    attention: str = option("auto", "how attention is computed; see almost-eval", choices=ATTENTION)
    save_every: int = option(200, "optimiser steps between two checkpoints to resume from; 0 for none", least=0)
    save_minutes: float = option(10.0, "minutes after which one is saved anyway; 0 for none", least=0)


@dataclass(frozen=True, slots=True)
class HeldOutSettings(TrainSettings):
    """What a trainer takes that can measure held-out rows as it goes."""

    eval_every: int = option(
        0, "optimiser steps between two measurements on held-out rows; the best checkpoint is kept; 0: none", least=0
    )
    eval_share: float = option(
        0.1, "share of the prompts held out, where no file of held-out rows is", least=0, most=0.5
    )


def check_hardware(device: str, optim: str, attention: str) -> None:
    """Refuse what needs a GPU, or a package that is not here.

    Raises:
        InputError: an optimiser of bitsandbytes, or flash attention, elsewhere.
    """
    needs = []
    if optim.endswith("8bit"):
        needs.append((f"--optim {optim}", "bitsandbytes"))
    if attention == "flash_attention_2":
        needs.append(("--attention flash_attention_2", "flash_attn"))
    for flag, package in needs:
        if pick_device(device) != "cuda":
            raise InputError(f"{flag} needs an NVIDIA GPU, and this trains on {pick_device(device)}; leave it out")
        if find_spec(package) is None:
            raise InputError(f"{flag} needs the package {package}, which is not installed: pip install {package}")
