"""An adapter of PEFT on disk, and how it becomes one model with its base.

It is merged into the base in float32 and then brought to the dtype of the run. So everything that holds for a model
holds for it (prefix sharing, padding, speed), and the numbers are those of the merged checkpoint that others save.
vLLM keeps the two apart and adds what the adapter says at each layer.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval.errors import MissingDependencyError, ModelError
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

FILES = CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PROMPTS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT"}
"""Kinds of PEFT that add to the input, not to the weights: nothing can be merged."""
_HEADS = {"lm_head", "embed_out", "embed_tokens", "wte", "word_embeddings"}
_APART = ("pissa", "olora", "corda", "loftq")
"""Ways to begin a LoRA that leave the base another matrix: it says nothing beside the base as it is."""
_NO_VALUES = ("meta tensor", "incompatible tensor type")
"""What torch says where values of a tensor on the `meta` device are read; PiSSA and OLoRA take the base apart."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be (0.31)."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter folder."""

    path: Path
    config: JSONObject
    """`adapter_config.json`."""
    weights: Path

    @property
    def base(self) -> str:
        """What it says its base model is."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def is_classifier(self) -> bool:
        """Whether it holds a score head for its base."""
        return self.config.get("task_type") == "SEQ_CLS"

    @property
    def rank(self) -> int:
        """The largest rank of a LoRA."""
        return max(int(self.config.get("r") or 1), *map(int, (self.config.get("rank_pattern") or {0: 0}).values()))

    @property
    def vllm_rank(self) -> int:
        """The rank that vLLM makes room for: it knows some sizes."""
        return next(size for size in _RANKS if size >= self.rank)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last names of the layers that it changes, sorted; empty where its files do not list them.

        vLLM must be told them. Else it makes room for a LoRA on the output head too, and there takes the rows of a
        prompt for one row a request (0.31): `prompt_logprobs` of several prompts in a step end the engine on a CPU.
        """
        if self.shapes:
            changed = (name.partition(".lora_")[0] for name in self.shapes if ".lora_" in name)
            return tuple(sorted({name.rpartition(".")[2] for name in changed}))
        listed = self.config.get("target_modules")  # one string is a pattern, or `all-linear`
        return tuple(sorted({str(name).rpartition(".")[2] for name in listed})) if isinstance(listed, list) else ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what it does: the config holds rank and scale."""
        return (self.path / CONFIG, self.weights)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Its own folder, where a tokenizer was saved with it."""
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        return self.path if any((self.path / name).is_file() for name in names) else None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its tensors; empty for pickles.

        Raises:
            ModelError: the file is not whole.
        """
        if self.weights.suffix != ".safetensors":
            return {}
        from safetensors import safe_open

        try:
            with safe_open(str(self.weights), framework="np") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has an error of its own, without a base
            raise ModelError(f"{self.weights} is not a whole safetensors file ({error}); save it again") from None

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the embedding that it brings, or None where it leaves the base's."""
        rows = [shape[0] for name, shape in self.shapes.items() if name.endswith(("embed_tokens.weight", "wte.weight"))]
        return max(rows) if rows else None


def merge_command(adapter: Adapter) -> str:
    """The command that makes a whole checkpoint of an adapter."""
    return f"`almost-train merge {shlex.quote(str(adapter.path))} --output DIR`"


def refuse_for_vllm(adapter: Adapter, *, scores: bool = False) -> None:
    """Raise ModelError where vLLM would leave out a part of the adapter, or cannot run it.

    With `scores` it may bring a score head of one layer without bias, which vLLM puts in the base's place.
    """
    config = adapter.config
    heads = {"score", "classifier"} if scores else set()  # PEFT states both, whichever the model has
    whole = {"base_model.model.score.weight"} if scores else set()
    part = None
    if config.get("peft_type") != "LORA":
        part = f"of the kind {config.get('peft_type')}"
    elif str(config.get("init_lora_weights")).lower().startswith(_APART):
        part = f"that took its base apart ({config['init_lora_weights']})"
    elif config.get("use_dora"):
        part = "with DoRA"
    elif config.get("bias") not in (None, "none"):
        part = "with biases"
    elif (
        not heads.issuperset(config.get("modules_to_save") or ())
        or config.get("trainable_token_indices")
        or (adapter.is_classifier and not scores)
    ):
        part = "with whole modules or tokens of its own"
    elif _HEADS.intersection(adapter.target_modules):
        part = "of the output head or the embedding"
    elif not adapter.target_modules:
        part = "whose layers cannot be told from its files"
    elif extra := [name for name in adapter.shapes if not (".lora_A." in name or ".lora_B." in name or name in whole)]:
        part = f"with {extra[0]}"
    elif adapter.rank > _RANKS[-1]:
        part = f"of rank {adapter.rank}"
    if part:
        raise ModelError(
            f"{adapter.path} is an adapter {part}, which vLLM cannot run: use the engine hf, or merge it first with "
            f"{merge_command(adapter)}"
        )


def open_adapter(path: Path, *, has_weights: bool, allow_pickle: bool) -> Adapter:
    """The adapter in a folder that holds one of `FILES`.

    Raises:
        ModelError: it lies beside full weights, is pickled, cannot be read, or cannot be merged into a base.
    """
    files = [path / name for name in FILES if (path / name).is_file()]
    if has_weights:
        raise ModelError(
            f"{path} holds full weights and {files[0].name} of an adapter: remove adapter_* if it is merged already, "
            "or move it to a folder of its own and give that one"
        )
    if files[0].name != CONFIG:
        raise ModelError(f"{path} holds {files[0].name} but no {CONFIG}, which says what it belongs to; save it again")
    try:
        config: JSONObject = json.loads(files[0].read_text(encoding="utf-8"))
        kind = str(config.get("peft_type") or "")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{files[0]} is not valid JSON for an adapter: {error}") from None
    if kind in _PROMPTS or not kind:
        raise ModelError(
            f"{path} is an adapter of the kind {kind or 'none'}, which changes no weights; use one that does"
        )
    if kind == "LORA" and not (isinstance(rank := config.get("r"), int) and rank > 0):
        raise ModelError(f"{files[0]} states the rank r: {rank!r}; set it to that of the weights, or save it again")
    if (path / WEIGHTS).is_file():
        return Adapter(path, config, path / WEIGHTS)
    if not (path / PICKLE).is_file():
        raise ModelError(f"{path} has an {CONFIG} but no {WEIGHTS}; save or download the adapter's weights there")
    if not allow_pickle:
        raise ModelError(
            f"{path} has only a pickled adapter ({PICKLE}), which can run code when loaded; save it as safetensors, or "
            "accept pickled weights if you trust its source",
            consent="allow_pickle",
        )
    return Adapter(path, config, path / PICKLE)


def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The base with the adapter in its weights; every tensor of the adapter must have its place, and none be missing.

    Raises:
        ModelError: it does not fit the base.
        MissingDependencyError: peft is not installed.
    """
    whole = _attach(model, adapter, None)
    if _HEADS.intersection(adapter.target_modules) or not adapter.target_modules:
        _untie(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a head is its own now: it shall be
        merged: PreTrainedModel = whole.merge_and_unload()
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        merged.config.get_text_config().tie_word_embeddings = False  # else it would be saved without its head
        merged.config.tie_word_embeddings = False
    return merged.requires_grad_(True)  # peft froze the base; a training may start from it


def _untie(model: torch.nn.Module) -> None:
    """Give each layer weights of its own: what is merged into an output head is none of the embedding's, if tied."""
    import torch

    taken: set[int] = set()
    for layer in model.modules():
        for name, weight in layer._parameters.items():
            if weight is not None and id(weight) in taken:
                setattr(layer, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
            taken.add(id(layer._parameters[name]))


def check_fit(model: PreTrainedModel, adapter: Adapter) -> str | None:
    """Refuse an adapter that does not fit its base, from the shapes in its header.

    Args:
        model: the base on the `meta` device; changed by this.
        adapter: what would be merged into it.

    Returns:
        Why this could not be told without values, as for some kinds of PEFT; None where it fits.

    Raises:
        ModelError, MissingDependencyError: see `merge_adapter`.
    """
    import torch

    if not adapter.shapes:
        return "the adapter is pickled"
    shapes = {name: torch.empty(shape, device="meta") for name, shape in adapter.shapes.items()}
    try:
        _attach(model, adapter, shapes)
    except NotImplementedError as error:
        return str(error)
    return None


class _Misfit(Exception):
    """Name, shape and wanted shape of a tensor of an adapter."""


def _attach(model: PreTrainedModel, adapter: Adapter, weights: Mapping[str, Tensor] | None) -> Any:
    """PEFT's model of base and adapter, with `weights` in the adapter; None reads them from its file.

    Raises:
        NotImplementedError: values are needed, and the model is on the `meta` device.
        ModelError, MissingDependencyError: see `merge_adapter`.
    """
    import torch

    try:
        import peft
    except ImportError:
        raise MissingDependencyError("an adapter needs the package 'peft'; install it with: pip install peft") from None
    if (kind := str(adapter.config.get("peft_type"))) not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(
            f"{adapter.path} is an adapter of the kind {kind}, which peft {peft.__version__} does not know; install "
            "the peft that made it"
        )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # what it starts at random is overwritten
            warnings.simplefilter("ignore")
            if adapter.embedding_rows is not None:
                model.resize_token_embeddings(adapter.embedding_rows, mean_resizing=False)
            config = peft.PeftConfig.from_pretrained(str(adapter.path))
            whole = peft.get_peft_model(model, config)
            if weights is None:
                weights = peft.load_peft_weights(str(adapter.path), device="cpu")
            own = peft.get_peft_model_state_dict(whole)
            missing = sorted(own.keys() - weights.keys())
            if misfit := next((k for k in sorted(own) if k in weights and weights[k].shape != own[k].shape), None):
                raise _Misfit(misfit, tuple(weights[misfit].shape), tuple(own[misfit].shape))
            result: Any = peft.set_peft_model_state_dict(whole, dict(weights))
            unused = sorted(result.unexpected_keys) or (sorted(weights.keys() - own.keys()) if missing else [])
    except _Misfit as misfit:
        name, shape, wanted = misfit.args
        raise ModelError(
            f"{adapter.path} does not fit its base {adapter.base}: its {name!r} has the shape {shape}, where base and "
            f"{CONFIG} make it {wanted}: the base, r or rank_pattern is not that of its training"
        ) from None
    except Exception as error:  # peft raises whatever its parts do
        on_meta = isinstance(error, NotImplementedError) or any(words in str(error) for words in _NO_VALUES)
        if model.device.type == "meta" and on_meta:
            raise NotImplementedError(f"{adapter.config.get('peft_type')} needs the values of the base") from None
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{adapter.path} does not fit its base {adapter.base}: {first:.200}") from None
    if missing or unused:
        what = f"lacks {missing[0]!r}" if missing else ""
        what += " and " if missing and unused else ""
        what += f"holds {unused[0]!r}, which the base has no place for" if unused else ""
        raise ModelError(f"{adapter.path} does not fit its base {adapter.base}: it {what}")
    return whole
