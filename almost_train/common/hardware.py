"""Settings of a training that some machines cannot follow: refused in one line, before a model is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from almost_eval.errors import InputError
from almost_eval.models.loading import pick_device

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor")
"""Of transformers' names. Those in 8 bits are bitsandbytes' own, which hold two bytes a weight in place of eight."""


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
