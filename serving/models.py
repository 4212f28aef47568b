"""What is served: the checkpoint behind a name, its chat template, where an answer stops, and what memory it takes.

Read from the checkpoint's files, no weights. transformers, which takes seconds to import, says before vLLM starts
whether tokenizer and tensors are what the files promise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.errors import InputError
from almost_eval.models.adapters import refuse_for_vllm
from almost_eval.models.chat import ChatTemplate, load_template, special_tokens, stop_strings
from almost_eval.models.checkpoint import (
    Checkpoint,
    context_length,
    find_checkpoint,
    refuse_adapter,
    refuse_stray_weights,
)
from almost_eval.models.stops import STOP_STRINGS, template_file
from almost_eval.models.tokenizers import Opening
from almost_eval.types import JSONObject, Message
from serving.door.names import served_name as name_of

ARCHITECTURES = {
    "policy": ("CausalLM", "LMHeadModel"),
    "reward": ("SequenceClassification", "RewardModel"),
}
"""Kind of server -> parts of the class name in `config.json` that it can serve."""

_AUTO_CLASSES = {"policy": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
"""Kind of server -> the class of transformers that knows which tensors the model takes."""

_SAMPLE = (Message("user", "a"), Message("assistant", "b"))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A checkpoint and how it is to be served."""

    kind: str
    """`policy` or `reward`."""
    checkpoint: Checkpoint
    name: str
    """What clients call it."""
    template: ChatTemplate
    chat_template: str | None
    """Argument of vLLM's `--chat-template`: a file or Jinja; None where the tokenizer's own serves as it is."""
    stop: tuple[str, ...]
    """Default stop strings of a chat; EOS ends an answer besides."""
    context_length: int
    """Tokens, of the model itself."""
    warning: str = ""
    """What could not be checked; empty where everything could."""

    @property
    def cache_bytes_per_token(self) -> int | None:
        """Bytes of keys and values for one token in float32; None where `config.json` does not tell."""
        text = self.checkpoint.config.get("text_config") or self.checkpoint.config

        def first(*names: str) -> int | None:
            return next((int(text[name]) for name in names if isinstance(text.get(name), int)), None)

        layers = first("num_hidden_layers", "n_layer", "num_layers")
        heads = first("num_attention_heads", "n_head", "num_heads")
        width = first("hidden_size", "n_embd")
        if not layers or not heads or not width:
            return None
        head_width = first("head_dim") or width // heads
        return 2 * layers * (first("num_key_value_heads") or heads) * head_width * 4

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in float32."""
        stored = sum(file.stat().st_size for file in self.checkpoint.weight_files)
        dtype = str(self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype") or "float32")
        return stored * (1 if dtype == "float32" else 2)


def find_model(
    kind: str,
    name: str,
    *,
    template: str = "auto",
    stop: Sequence[str] | None = None,
    served_name: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    allow_unused_weights: bool = False,
) -> ServedModel:
    """Find a checkpoint and settle how it is served.

    Args:
        kind: `policy` or `reward`.
        name: a directory, a hub id, or a built-in name.
        template: `auto` (the tokenizer's, else ALMoST's dialogue format), a built-in template, or a Jinja file.
        stop: default stop strings of a chat; None takes those of the template.
        served_name: what clients call the model; None is the name itself, of a directory its last part.
        allow_pickle: accept pickled weights.
        trust_remote_code: the checkpoint's own code runs.
        allow_unused_weights: tensors in the files that the model does not take are accepted.

    Raises:
        InputError: the template cannot be had or cannot render.
        ModelError: see `find_checkpoint`; an adapter that vLLM would not run whole; for a reward model also more
            labels than one, or no score head.
    """
    checkpoint = find_checkpoint(name, allow_pickle=allow_pickle, architectures=ARCHITECTURES[kind])
    if checkpoint.adapter and kind == "policy":
        refuse_for_vllm(checkpoint.adapter)
    else:
        refuse_adapter(checkpoint, "vLLM's reward server")
    refuse_stray_weights(checkpoint)
    if kind == "reward":
        from almost_eval.rewards.base import refuse_wrong_head

        refuse_wrong_head(checkpoint, custom=trust_remote_code and "auto_map" in checkpoint.config)
    from almost_eval.models.loading import load_tokenizer
    from almost_eval.models.tensors import compare_tensors, not_compared, refuse_tensors

    # vLLM would serve with one that loses text.
    opening = Opening.of(load_tokenizer(checkpoint, trust_remote_code=trust_remote_code))
    tensors = compare_tensors(checkpoint, _AUTO_CLASSES[kind], trust_remote_code=trust_remote_code)
    refuse_tensors(checkpoint, tensors, allow_unused=allow_unused_weights)
    tokenizer: Any = TokenizerFiles(checkpoint.tokenizer_folder)
    chosen = load_template(template, tokenizer)
    if chosen is None:
        raise InputError("a server needs a chat template: give --template auto, a built-in name or a Jinja file")
    if stop is None:
        stop = stop_strings(chosen)
    if any(not text for text in stop):
        stop = ()  # `--stop ""` asks for none
    return ServedModel(
        kind,
        checkpoint,
        served_name or name_of(name),
        chosen,
        _chat_template(chosen, opening, tokenizer),
        tuple(stop),
        context_length(checkpoint.config, tokenizer),
        not_compared(tensors.unknown) if tensors.unknown else "",
    )


def _chat_template(template: ChatTemplate, opening: Opening, tokenizer: TokenizerFiles) -> str | None:
    """What vLLM is given so that its server encodes a conversation as `almost_eval.models.chat.encode_text` does.

    vLLM takes a rendered conversation to hold its special tokens already. Our templates leave BOS to the tokenizer, as
    do checkpoints saved with them: there the template must write it, or the model would miss it in every chat.

    Raises:
        TemplateError: it writes BOS twice.
    """
    text = template.render(_SAMPLE, special_tokens=special_tokens(tokenizer))  # type: ignore[arg-type]
    opening.refuse_twice(text)
    if opening.ids and not opening.is_written(text):
        return opening.line.replace(" -}}\n", " }}").replace("{{- ", "{{ ") + template.source
    if template.name == "tokenizer":
        return None
    return str(template_file(template.name) if template.name in STOP_STRINGS else Path(template.name).resolve())


class TokenizerFiles:
    """The parts of a tokenizer that stand in its files: chat template, special tokens, length."""

    def __init__(self, folder: Path) -> None:
        config = _json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        own = config.get("chat_template")
        if isinstance(own, list):  # older checkpoints: several, with names
            own = {entry["name"]: entry["template"] for entry in own}
        self.chat_template: str | dict[str, str] | None = (
            template.read_text(encoding="utf-8") if template.is_file() else own
        )
        # As transformers reads them: a config that lists its added tokens is whole, an older one gives way to the map.
        beside = _json(folder / "special_tokens_map.json")
        tokens = {**beside, **config} if "added_tokens_decoder" in config else {**config, **beside}
        self.special_tokens_map: dict[str, str] = {
            name: str(value["content"] if isinstance(value, dict) else value)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (value := tokens.get(name))
        }
        limit = config.get("model_max_length")
        self.model_max_length: int | None = int(limit) if isinstance(limit, int | float) else None


def _json(file: Path) -> JSONObject:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); download or save the tokenizer again") from None
    return content if isinstance(content, dict) else {}


def available_memory() -> float:
    """Bytes that this machine, or this container of it, could still give to a process; infinite where unknown."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    left = math.inf
    try:
        entry = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        left = int(entry.split()[1]) * 1024
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            cache = next(x for x in (group / "memory.stat").read_text().splitlines() if x.startswith("inactive_file "))
            used = int((group / "memory.current").read_text()) - int(cache.split()[1])  # a file's pages can be dropped
            left = min(left, int(limit) - used)
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    return left
