"""Before a model computes: tokenizer, weights, dtype, device. When it is no longer needed: its memory given back.

Whatever cannot be loaded is refused in one line that says what to do.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from almost_eval.errors import InputError, ModelError, RunError, problem_of
from almost_eval.models.adapters import merge_adapter
from almost_eval.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    class CausalLM(PreTrainedModel):
        """What `AutoModelForCausalLM` gives, with the types that transformers leaves out."""

        generation_config: GenerationConfig

        def generate(self, **options: object) -> torch.Tensor:
            """Token ids (B, T), the prompts included."""


DTYPES = ("auto", "float32", "bfloat16", "float16")
Purpose = Literal["score", "generate"]
"""What a checkpoint is held for."""
LARGE = 50_000_000
"""Parameters from which half the bytes of weights are worth bfloat16's rounding."""
_CAP = re.compile(r"^att.*soft_?cap")
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


def settled_attention(attention: str, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> str:
    """The attention to load a checkpoint with: `auto` is eager where the model caps its attention logits.

    transformers takes sdpa by itself wherever a class has it, also for Gemma 2, and sdpa leaves the caps out without a
    word: every number would be that of another model.

    Raises:
        InputError: `sdpa` for a model with such caps.
    """
    if attention not in ("auto", "sdpa") or not (cap := _attention_cap(checkpoint, trust_remote_code)):
        return attention
    if attention == "sdpa":
        raise InputError(
            f"{checkpoint.path} caps its attention logits ({cap}), which the attention sdpa leaves out; use the "
            "attention eager, or auto, which takes it"
        )
    return "eager"


def attention_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """What to hand to `from_pretrained` for the attention `auto`; see `settled_attention`."""
    attention = settled_attention("auto", checkpoint)
    return {} if attention == "auto" else {"attn_implementation": attention}


def _attention_cap(checkpoint: Checkpoint, trust_remote_code: bool) -> str | None:
    """The setting by which a model caps its attention logits, with its value; None where it does not."""
    from transformers import AutoConfig

    try:  # not the file alone: Gemma 2's class has a cap also where config.json states none
        with quiet_transformers():
            whole = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
        settings = whole.get_text_config().to_dict().items()
    except Exception:  # what cannot be read is refused, with its reason, where the weights are checked
        return None
    return next(
        (
            f"{name} {value:g}"
            for name, value in settings
            if _CAP.search(name) and isinstance(value, float | int) and value
        ),
        None,
    )


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        ModelError: there is none, it cannot be read, or it would feed the model something else than its text.
    """
    from transformers import AutoTokenizer

    from almost_eval.models.tokenizers import CURE, check_tokenizer

    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(checkpoint.tokenizer_folder), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises half a dozen unrelated kinds here
        refuse_own_code(checkpoint, str(error))
        _refuse_damaged(checkpoint)
        there = (checkpoint.tokenizer_folder / "tokenizer.json").is_file()
        cure = f"{CURE}, or save" if there else "save"
        raise ModelError(
            f"{checkpoint.tokenizer_folder} has no tokenizer that transformers can read ({first_line(error)}); "
            f"{cure} the tokenizer beside the weights"
        ) from None
    # It warns of long texts, once: they are counted and refused here.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    check_tokenizer(tokenizer, checkpoint, checkpoint.tokenizer_folder)
    return tokenizer


def _refuse_damaged(checkpoint: Checkpoint) -> None:
    """Raise ModelError where a file that a tokenizer is read from is damaged, or `config.json` is not valid."""
    folder = checkpoint.tokenizer_folder
    for name in (*_TOKENIZER_FILES, "chat_template.jinja"):
        file = folder / name
        try:
            text = file.read_text(encoding="utf-8") if file.is_file() else "{}"
            content = json.loads(text) if name.endswith(".json") else {}
            if not isinstance(content, dict):
                raise ValueError("it is no JSON object")
            if not _is_chat_template(content.get("chat_template")):
                raise ValueError('its chat_template is no text, and no list of {"name": ..., "template": ...}')
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read ({problem_of(error)}); download or save it again") from None
    if not (config := checkpoint.path / "config.json").is_file():
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(str(checkpoint.path))
    except Exception as error:  # a validation of huggingface_hub's, an unknown type, a value that cannot be
        if "trust_remote_code" not in str(error):
            raise ModelError(f"{config} is no valid config: {first_line(error)}") from None


def _is_chat_template(value: object) -> bool:
    """Whether it is what a tokenizer may state as its template: nothing, one, or several by name."""
    if isinstance(value, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in value]
        return all(isinstance(entry.get(key), str) for entry in entries for key in ("name", "template"))
    return value is None or isinstance(value, str | dict)


def refuse_own_code(checkpoint: Checkpoint, problem: str) -> None:
    """Raise ModelError where what transformers said of a checkpoint is that it needs code of its own."""
    if "trust_remote_code" in problem:
        raise ModelError(
            f"{checkpoint.path} needs Python code that it ships (auto_map), which is not run unasked; read it, and let "
            "it run if you trust its source",
            consent="trust_remote_code",
        ) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers draws no bars and says only errors; then it is as it was."""
    from transformers.utils import logging as transformers_logging

    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def load_weights(
    auto_class: Any,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    attention: str,
    trust_remote_code: bool,
    allow_unused: bool = False,
    quantization: Any = None,
) -> Any:
    """A transformers model in eval mode with every weight from the checkpoint.

    `quantization`, a config of transformers', holds the weights in fewer bits. They are put on the GPU at once then.

    Raises:
        ModelError: weights are missing (transformers would initialise them at random), or cannot be read.
        RunError: not enough memory.
    """
    import torch

    attention = settled_attention(attention, checkpoint, trust_remote_code=trust_remote_code)
    extra: dict[str, object] = {} if attention == "auto" else {"attn_implementation": attention}
    adapter = checkpoint.adapter
    if checkpoint.brings_head:
        extra["num_labels"] = 1
    if quantization is not None:
        extra["quantization_config"] = quantization
    try:
        with quiet_transformers():
            model, info = auto_class.from_pretrained(
                str(checkpoint.path),
                dtype=torch.float32 if adapter else dtype,  # merged before it is rounded
                use_safetensors=checkpoint.weight_files[0].suffix == ".safetensors",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **extra,
            )
    except torch.OutOfMemoryError as error:
        raise RunError(f"not enough memory for the weights of {checkpoint.name}: {first_line(error)}") from None
    except Exception as error:  # of many kinds without a common base, as the parts of transformers raise them
        refuse_own_code(checkpoint, str(error))
        refuse_unknown_value(checkpoint, error)
        cure = "; a value in its config.json most likely has the wrong type" if isinstance(error, TypeError) else ""
        raise ModelError(f"transformers cannot load {checkpoint.path}: {first_line(error)}{cure}") from None
    lost = sorted({*info.get("missing_keys", ()), *(key for key, *_ in info.get("mismatched_keys", ()))})
    if checkpoint.brings_head:  # transformers fills it at random, and the adapter then replaces it
        lost = [name for name in lost if not name.startswith(("score.", "classifier."))]
    if lost:
        raise ModelError(
            f"{checkpoint.path} lacks {len(lost)} weights of its own architecture, first {lost[0]!r}; transformers "
            "would set them at random, so nothing it says would mean anything"
        )
    if (unused := sorted(info.get("unexpected_keys", ()))) and not (allow_unused or checkpoint.brings_head):
        raise ModelError(
            f"{checkpoint.path} holds {len(unused)} tensors that its model would not use, first {unused[0]!r}; mend "
            "the checkpoint or its config.json"
        )
    # Some checkpoints ask for tuples, or for every layer's states beside the logits: what a pass gives is decided here.
    model.config.return_dict, model.config.output_attentions, model.config.output_hidden_states = True, False, False
    if allow_unused and getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()  # transformers leaves apart what differs; the config is what was accepted
    if adapter:
        merged: Any = merge_adapter(model, adapter)
        model = merged.to(dtype)
    try:
        return model.eval() if quantization is not None else model.to(device).eval()
    except torch.OutOfMemoryError:
        raise RunError(f"not enough memory on {device} for {checkpoint.name}; use a smaller dtype or device") from None


def refuse_unknown_value(checkpoint: Checkpoint, error: Exception) -> None:
    """Raise ModelError where an error is a name in `config.json` that transformers has in no table of its own."""
    if isinstance(error, KeyError):
        key = next((key for key, value in _flat(checkpoint.config) if value == error.args[0]), None)
        if key is not None:
            raise ModelError(
                f"{checkpoint.path / 'config.json'} says {key}: {error.args[0]!r}, which transformers does not know; "
                "mend it, or install the version of transformers that the checkpoint was saved with"
            ) from None


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """`rope_parameters.rope_type` and its value, for every setting."""
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def why_not_finite(model: Any) -> str:
    """Why a loaded model gives numbers that are not finite, and what to do; reads its weights."""
    import torch

    dtype = str(model.dtype).removeprefix("torch.")
    name = next((name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
    if dtype == "float16":
        what = f": its weight {name} is not finite in it" if name else ""
        return f"float16 overflows beyond 65504{what}; use the dtype bfloat16 or float32"
    if name:
        return f"its weight {name} holds NaN or infinity; download or save the checkpoint again"
    return "its weights are finite, so a value in its config.json is most likely wrong (rms_norm_eps, rope_parameters)"


def pick_dtype(dtype: str, checkpoint: Checkpoint, device: str, purpose: Purpose = "score") -> str:
    """What `auto` stands for: the checkpoint's own off the CPU; on a CPU float32.

    On a CPU that computes in bfloat16, a checkpoint of `LARGE` parameters or more generates in it: reading the weights
    is most of what a token costs, and they are half as many bytes. Scores stay float32.
    """
    if dtype != "auto":
        return dtype
    if device != "cpu":
        return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    if purpose == "generate" and checkpoint.n_parameters() >= LARGE and cpu_has_bfloat16():
        return "bfloat16"
    return "float32"


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AVX-512-BF16 or AMX-BF16); False where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


@functools.cache
def say_bfloat16(name: str) -> None:
    """One line on stderr, once for a model: `auto` chose bfloat16."""
    sys.stderr.write(f"{name}: generates in bfloat16, which this CPU computes in; --dtype float32 overrides it\n")
    sys.stderr.flush()


def pick_device(device: str) -> str:
    """`auto` -> the accelerator where there is one.

    Raises:
        InputError: a device that torch does not know or does not see.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # `meta` makes tensors, and has no values to read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} is not usable here ({first_line(error)}); use cpu or auto") from None
    return device


def first_line(error: BaseException) -> str:
    """What an error says first, at most 200 characters: libraries explain themselves over many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


def release_memory() -> None:
    """Give what nobody holds any more back to the system, and to other processes on a GPU.

    Python frees a model when nothing names it, but for cycles. The memory stays with the process all the same: glibc
    keeps tensors below 32 MB in its heap (13 GB of them after a reward model of 270 M had been trained on a CPU), and
    torch keeps what it has on a GPU.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give back what is free in the heap of glibc: 345 MB after a vocabulary of 262,144 tokens was read."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)
