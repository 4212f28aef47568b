"""LoRA (arXiv 2106.09685, through PEFT): small matrices beside frozen weights are trained, and saved as an adapter.

The base is frozen, so it needs no gradients and no optimiser state, and with `bf16` it is held in bfloat16: a 7B model
is 14 GB then. With `quantize` it is held in 4 bits (QLoRA, arXiv 2305.14314, through bitsandbytes): some 4 GB. The
adapter is trained in float32. Its folder names the base it belongs to, and every command that takes a model takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import InputError, MissingDependencyError, did_you_mean
from almost_train.common.config import option
from almost_train.common.seeding import seeded

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

ALL = "all-linear"
"""PEFT's word for every linear layer but the output's."""
ADAPTER = "adapter"
"""The folder, inside the stage's, that holds the adapter where `merge` puts whole weights into the usual one."""
BASE = "base"
"""The folder, inside the stage's, for the whole weights of a base that was an adapter itself; see `whole_base`."""
_HEADS = ("lm_head", "embed_out", "score", "classifier")
"""Output layers, which are never held in 4 bits: a score head is trained whole."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """How an adapter is trained, for every stage that trains."""

    lora_rank: int = option(0, "Train a LoRA of this rank, the weights frozen; 0 trains the weights.", least=0)
    lora_alpha: float | None = option(None, "The LoRA counts alpha / rank times; twice the rank if not given.", above=0)
    lora_targets: tuple[str, ...] = option((ALL,), "Linear layers it stands beside: all-linear, or q_proj, v_proj, ...")
    lora_dropout: float = option(0.0, "Of what goes into the LoRA, in updates alone.", least=0, most=0.9)
    quantize: str = option(
        "none", "Hold the frozen weights in 4 bits (NF4, bitsandbytes; NVIDIA GPUs).", choices=("none", "4bit")
    )
    merge: bool = option(False, "Beside the adapter, save whole weights with it merged in.")

    @property
    def is_quantized(self) -> bool:
        """Whether the frozen weights are held in 4 bits."""
        return self.quantize != "none"


def check_lora(settings: LoraSettings, device: str) -> None:
    """Refuse what does not go together, and 4 bits where they cannot be had.

    Args:
        settings: see there.
        device: where to train; `auto` is a GPU where there is one.

    Raises:
        InputError: settings of a LoRA without a rank; 4 bits without a GPU.
        MissingDependencyError: bitsandbytes is not installed.
    """
    default = LoraSettings()
    names = ("lora_alpha", "lora_targets", "lora_dropout", "quantize", "merge")
    set_anyway = [name for name in names if getattr(settings, name) != getattr(default, name)]
    if set_anyway and not settings.lora_rank:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in set_anyway)
        raise InputError(f"{flags} without a rank; give --lora-rank, or leave it out")
    if not settings.is_quantized:
        return
    import torch

    if not torch.cuda.is_available() or not device.startswith(("auto", "cuda")):
        here = "the CPU" if device in ("auto", "cpu") else device
        raise InputError(
            f"--quantize {settings.quantize} needs an NVIDIA GPU, and this would train on {here}; leave it out, or "
            "train where there is one"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f"--quantize {settings.quantize} needs the package 'bitsandbytes'; install it with: "
            "pip install 'almost-toolkit[quantize]'"
        )


def base_dtype(settings: LoraSettings, *, bf16: bool) -> torch.dtype:
    """What the weights are held in: float32 where they are trained, or what is computed in where they are frozen."""
    import torch

    return torch.bfloat16 if settings.lora_rank and (bf16 or settings.is_quantized) else torch.float32


def quantization(settings: LoraSettings) -> BitsAndBytesConfig | None:
    """What `from_pretrained` is told of 4 bits, or None: normal floats, their scales in 8 bits, bfloat16 products."""
    if not settings.is_quantized:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(_HEADS),  # of 4 bits too, whatever its name says
    )


def lora_config(settings: LoraSettings, kind: str) -> LoraConfig:
    """PEFT's form of the settings.

    Args:
        settings: see there.
        kind: PEFT's task: `CAUSAL_LM`, `SEQ_CLS` (a score head is trained too, and saved whole), `FEATURE_EXTRACTION`.
    """
    from peft import LoraConfig

    targets: Any = ALL if settings.lora_targets == (ALL,) else list(settings.lora_targets)
    return LoraConfig(
        task_type=kind,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,  # type: ignore[arg-type]  # PEFT takes numbers too
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
    )


def add_lora(model: nn.Module, settings: LoraSettings, base: Path, *, kind: str, seed: int) -> Any:
    """The model with a new adapter, everything else frozen. At first it changes nothing: half of it is zeros.

    Args:
        model: the base, as `ready_for_lora` leaves it.
        settings: see there.
        base: its folder, which the adapter's config names.
        kind: see `lora_config`.
        seed: of the half that is not zeros.

    Raises:
        InputError: the model has no such layers.
    """
    from peft import get_peft_model

    check_layers(model, settings)
    with layers_named(settings), seeded(seed):
        whole = get_peft_model(ready_for_lora(model, settings), lora_config(settings, kind))
    settle_config(whole, base)
    return whole


def settle_config(model: Any, base: Path) -> None:
    """Make what is saved of a new adapter's settings the same in every process.

    Args:
        model: PEFT's, with the adapter.
        base: the folder of its base, which the settings are to name.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.target_modules = sorted(config.target_modules)  # a set, whose order is another in each process


def ready_for_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """The base as an adapter is put on it: of 4 bits, what is not held in them (norms, embeddings) is in float32."""
    if not settings.is_quantized:
        return model
    from peft import prepare_model_for_kbit_training

    # Checkpointing is the trainer's to turn on.
    prepared: nn.Module = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return prepared


def check_layers(model: nn.Module, settings: LoraSettings) -> None:
    """Refuse a name of no layer: PEFT passes over one where another name fits, and trains less than was asked.

    Raises:
        InputError: the model has no such layer.
    """
    if settings.lora_targets == (ALL,):
        return
    names = [name for name, module in model.named_modules() if not list(module.children())]
    for target in settings.lora_targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            layers = {name.rpartition(".")[2] for name in names} - {""}
            raise InputError(f"--lora-targets {target}: no layer is called so; {did_you_mean(target, layers, 20)}")


@contextmanager
def layers_named(settings: LoraSettings) -> Iterator[None]:
    """Inside, layers that the model does not have are an InputError."""
    try:
        yield
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        raise InputError(
            f"--lora-targets {', '.join(settings.lora_targets)}: {str(error).splitlines()[0]:.200}"
        ) from None


def train_in_float32(model: nn.Module) -> None:
    """The trained weights back to float32: TRL rounds those beside 4 bits to bfloat16, which loses small steps."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


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


def set_lora_dropout(model: nn.Module, *, active: bool) -> None:
    """Turn the adapter's dropout on or off, whatever mode the rest of the model is in."""
    for name, module in model.named_modules():
        if "lora_dropout" in name.split("."):
            module.train(active)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model, every dropout of it at 0, so that training mode computes what evaluation does."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "drop_prob" in name):
                setattr(module, name, 0.0)  # applied by functions: attention_dropout
    return model
