"""LoRA (arXiv 2106.09685, through PEFT): small matrices beside frozen weights are trained, and saved as an adapter.

The base is frozen, so it needs no gradients and no optimiser state, and with `bf16` it is held in bfloat16: a 7B model
is 14 GB then. The adapter is trained in float32. Its folder names the base it belongs to, and every command that takes
a model takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import InputError
from almost_eval.models.checkpoint import Checkpoint, refuse_adapter
from almost_train.common.config import option
from almost_train.common.seeding import seeded

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

ALL = "all-linear"
"""PEFT's word for every linear layer but the output's."""
ADAPTER = "adapter"
"""The folder, inside the stage's, that holds the adapter where `merge` puts whole weights into the usual one."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """How an adapter is trained, for every stage that trains."""

    lora_rank: int = option(0, "Train a LoRA of this rank, the weights frozen; 0 trains the weights.", least=0)
    lora_alpha: float | None = option(None, "The LoRA counts alpha / rank times; twice the rank if not given.", above=0)
    lora_targets: tuple[str, ...] = option((ALL,), "Linear layers it stands beside: all-linear, or q_proj, v_proj, ...")
    merge: bool = option(False, "Beside the adapter, save whole weights with it merged in.")


def check_lora(settings: LoraSettings, checkpoint: Checkpoint, what: str) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: settings of a LoRA without a rank.
        ModelError: an adapter as the base: the new adapter would belong to weights that are nowhere on disk.
    """
    if settings.lora_rank:
        refuse_adapter(checkpoint, f"a LoRA of {what}")
        return
    default = LoraSettings()
    names = ("lora_alpha", "lora_targets", "merge")
    if set_anyway := [name for name in names if getattr(settings, name) != getattr(default, name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in set_anyway)
        raise InputError(f"{flags} without a rank; give --lora-rank, or leave it out")


def base_dtype(settings: LoraSettings, *, bf16: bool) -> torch.dtype:
    """What the weights are held in: float32 where they are trained, or what is computed in where they are frozen."""
    import torch

    return torch.bfloat16 if settings.lora_rank and bf16 else torch.float32


def add_lora(
    model: nn.Module, settings: LoraSettings, base: Path, *, kind: str, seed: int, dropout: float = 0.0
) -> Any:
    """The model with a new adapter, everything else frozen. At first it changes nothing: half of it is zeros.

    Args:
        model: the base.
        settings: see there.
        base: its folder, which the adapter's config names.
        kind: PEFT's task: `CAUSAL_LM`, `SEQ_CLS` (a score head is trained too, and saved whole), `FEATURE_EXTRACTION`.
        seed: of the half that is not zeros.
        dropout: share of what goes into the adapter that is set to 0 in training.

    Raises:
        InputError: the model has no such layers.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = ALL if settings.lora_targets == (ALL,) else list(settings.lora_targets)
    config = LoraConfig(
        task_type=kind,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,  # type: ignore[arg-type]  # PEFT takes numbers too
        lora_dropout=dropout,
        target_modules=targets,
    )
    try:
        with seeded(seed):
            whole: PeftModel = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"--lora-targets {', '.join(settings.lora_targets)}: {str(error).splitlines()[0]:.200}"
        ) from None
    whole.peft_config["default"].base_model_name_or_path = str(base)
    return whole


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Inside, a model with an adapter is its base."""
    with model.disable_adapter():
        yield


def adapter_to_zero(model: nn.Module) -> None:
    """The adapter changes nothing again, as when training began."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
