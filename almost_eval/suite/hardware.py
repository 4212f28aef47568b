"""How fast GPUs are and how large published models, for plans of time and money.

Rates of a GPU are its datasheet's: dense bfloat16 tensor operations and memory bandwidth. Reading many tokens at once,
in training and in scoring, is taken to reach 40 % of the first (the 8B to 405B models of arXiv 2407.21783, table 4,
reached 38 to 43 % in training), sampling half of the second (an assumption: every step reads all weights once).
"""

from __future__ import annotations

from dataclasses import dataclass

from almost_eval.errors import InputError, did_you_mean
from almost_eval.models.checkpoint import Checkpoint

TRAINING_SHARE = 0.40
SAMPLING_SHARE = 0.5
GB = 10**9


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU."""

    memory: int
    """Bytes."""
    flops: float
    """Dense bfloat16 operations a second."""
    bandwidth: float
    """Bytes a second."""
    source: str


GPUS = {
    "a100-80gb": Gpu(80 * GB, 312e12, 2039e9, "NVIDIA A100 80GB SXM datasheet"),
    "h100-80gb": Gpu(80 * GB, 989e12, 3350e9, "NVIDIA H100 SXM datasheet"),
    "l40s-48gb": Gpu(48 * GB, 362e12, 864e9, "NVIDIA L40S datasheet"),
    "rtx4090-24gb": Gpu(24 * GB, 165e12, 1008e9, "NVIDIA Ada GPU architecture whitepaper"),
}
"""Names for `--gpu`."""


def rates_in_words(gpu: str | None, measure: bool, reads: str, writes: str) -> str:
    """By what the times of a plan are; `reads` is the work at `TRAINING_SHARE`, `writes` that at `SAMPLING_SHARE`."""
    if measure:
        return "what was measured on this machine"
    if gpu is None:
        return "no rates: give --gpu for those of a datasheet, or --measure"
    return (
        f"the {GPUS[gpu].source}: {reads} at {TRAINING_SHARE:.0%} of its bfloat16 operations, {writes} at "
        f"{SAMPLING_SHARE:.0%} of its memory bandwidth"
    )


def gpu_named(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        InputError: there is none.
    """
    if name not in GPUS:
        raise InputError(f"no rates of a GPU {name!r}; {did_you_mean(name, GPUS, 20)}")
    return GPUS[name]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What of a model decides its cost."""

    name: str
    parameters: int
    cache_bytes: int
    """Of the keys and values of a token, in bfloat16."""

    @property
    def weight_bytes(self) -> int:
        """In bfloat16."""
        return 2 * self.parameters


def llama(
    name: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32_000
) -> ModelSize:
    """A model of LLaMA's architecture (arXiv 2302.13971): no biases, a head of its own."""
    keys = hidden // heads * kv_heads
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    return ModelSize(name, 2 * vocabulary * hidden + layers * layer + hidden, 2 * layers * keys * 2)


SIZES = {
    "7b": llama("7b", 4096, 11008, 32, 32, 32),
    "13b": llama("13b", 5120, 13824, 40, 40, 40),
    "70b": llama("70b", 8192, 28672, 80, 64, 8),
}
"""Names for `--sizes`: Llama 2 (arXiv 2307.09288), whose dimensions its published configurations have."""


def size_named(name: str) -> ModelSize:
    """The size of a name.

    Raises:
        InputError: there is none.
    """
    if name not in SIZES:
        raise InputError(f"--sizes: unknown size {name!r}; {did_you_mean(name, SIZES)}")
    return SIZES[name]


def size_of(checkpoint: Checkpoint) -> ModelSize:
    """The size of a checkpoint, from its configuration and the headers of its weights."""
    text = checkpoint.config.get("text_config") or checkpoint.config
    heads = int(text.get("num_attention_heads") or 1)
    width = int(text.get("head_dim") or int(text.get("hidden_size") or 0) // heads)
    keys = width * int(text.get("num_key_value_heads") or heads)
    layers = int(text.get("num_hidden_layers") or 0)
    return ModelSize(checkpoint.name, checkpoint.n_parameters(), 2 * layers * keys * 2)
