"""Whether the tensors of a checkpoint are those of its model: none missing, none of another shape, none left over.

transformers fills what is missing at random and drops what is left over, each with a warning at most. Here both are
known before a weight is read: transformers' own loader runs on the `meta` device, where it compares the headers of the
files with the model, renames included, and reads no values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.errors import ModelError
from almost_eval.models.adapters import check_fit
from almost_eval.models.checkpoint import CAUSAL, Checkpoint

_SCALES = re.compile(
    r"\.(?:qweight|qzeros|scales?|zeros|\w*g_idx|SCB|weight_format|absmax|quant_map|\w*_scales?|\w*_scale_inv|"
    r"\w*_scale_2|weight_packed|weight_shape|\w*_zero_point|\w*_blocks)$|\.(?:quant_state|absmax|quant_map|nested_\w+)(?:\.|$)"
)
_INTEGERS = re.compile(r"[IU]\d+|BOOL")
"""How safetensors names the dtypes of whole numbers."""
_OTHER_HEAD = re.compile(r"^(?:score|classifier|v_head|lm_head|classification_head|qa_outputs|summary|cls)\.")
_SIZES = {
    "num_key_value_heads": r"\.(?:k_proj|v_proj)\.",
    "num_local_experts or num_experts": r"\.(?:experts|gate|router)\b",
    "intermediate_size": r"\.(?:mlp|feed_forward)\.",
    "vocab_size": r"embed|wte|lm_head",
}
"""Setting -> the tensors whose shapes it alone decides."""
_LM_HEAD = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)


@dataclass(frozen=True, slots=True)
class Tensors:
    """How the tensors of a checkpoint fit its model; all names are sorted."""

    missing: tuple[str, ...] = ()
    """Of the model, and not in the files."""
    mismatched: tuple[str, ...] = ()
    """In the files with another shape."""
    unused: tuple[str, ...] = ()
    """In the files, and not of the model; what transformers itself ignores by design is not among them."""
    untied: str | None = None
    """An output head in the files that differs from the embedding that the config ties it to."""
    integers: tuple[str, ...] = ()
    """Whole numbers in the files where the model has fractions: quantised, and no scale is stated."""
    unknown: str | None = None
    """Why this could not be found out; None where it could."""


def compare_tensors(
    checkpoint: Checkpoint, auto_class: str, *, trust_remote_code: bool = False, **config: object
) -> Tensors:
    """How the tensors fit the model, from headers alone.

    Args:
        checkpoint: the model; where its weights are pickles, nothing is compared before they are loaded.
        auto_class: the class of transformers that will load it, such as `AutoModelForCausalLM`.
        trust_remote_code: run Python code that the checkpoint ships.
        config: changes to its config, such as `num_labels`.

    Raises:
        ModelError: it needs code of its own that may not run; an adapter that does not fit its base.
    """
    if any(file.suffix != ".safetensors" for file in checkpoint.weight_files):
        return Tensors(unknown="its weights are pickled")
    final = auto_class
    kind = _own_kind(checkpoint)
    if checkpoint.adapter and checkpoint.adapter.is_classifier and any(part in kind for part in CAUSAL):
        auto_class = "AutoModelForCausalLM"  # the base as it is; the adapter brings the score head
    import transformers

    from almost_eval.models.loading import first_line, quiet_transformers, refuse_own_code, refuse_unknown_value

    try:
        with quiet_transformers():
            model, info = getattr(transformers, auto_class).from_pretrained(
                str(checkpoint.path),
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **config,
            )
    except Exception as error:  # a package is missing, an architecture is unknown: loading itself will say so
        refuse_own_code(checkpoint, str(error))
        refuse_unknown_value(checkpoint, error)
        return Tensors(unknown=first_line(error))
    unfit = None
    if checkpoint.adapter:
        unfit = check_fit(model if final == auto_class else _empty(checkpoint, final), checkpoint.adapter)
    tied = auto_class == "AutoModelForCausalLM" and getattr(model.config, "tie_word_embeddings", False)
    untied = _untied(checkpoint) if tied else None
    return Tensors(
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(str(key if isinstance(key, str) else key[0]) for key in info["mismatched_keys"])),
        tuple(sorted({*info["unexpected_keys"], *((untied,) if untied else ())})),
        untied,
        _integers(checkpoint, model),
        unfit,
    )


def check_weights(checkpoint: Checkpoint, auto_class: str) -> None:
    """`refuse_tensors` for training, where nothing left over is accepted."""
    refuse_tensors(checkpoint, compare_tensors(checkpoint, auto_class), allow_unused=False, flag=False)


def refuse_tensors(checkpoint: Checkpoint, tensors: Tensors, *, allow_unused: bool, flag: bool = True) -> None:
    """Raise ModelError where the files do not fill the model, or hold more than it takes.

    Args:
        checkpoint: the model.
        tensors: how they fit.
        allow_unused: left-over tensors are accepted.
        flag: they could be accepted: a command that has the flag names it.
    """
    where, cause = checkpoint.path, _cause(checkpoint, tensors)
    lost = [*tensors.missing, *tensors.mismatched]
    if tensors.missing:
        cause = _unlisted(checkpoint, tensors.missing) or cause
        if not cause and tensors.unused:
            cause = f"; the files hold {names(tensors.unused, 2)} instead: another architecture, or other names for it"
    if lost:
        kind = "lacks" if tensors.missing else "has in another shape"
        raise ModelError(
            f"{where} {kind} {len(lost)} weights of its own architecture, first {lost[0]!r}; transformers would set "
            f"them at random, so nothing it says would mean anything{cause}"
        )
    if tensors.integers:
        raise ModelError(
            f"{where} holds {len(tensors.integers)} weights as whole numbers: {names(tensors.integers)}; they are "
            "quantised, and config.json has no quantization_config that says how; save it with one, or unquantised"
        )
    if tensors.unused and not allow_unused:
        way = ", or go on without them" if flag else ""
        raise ModelError(
            f"{where} holds {len(tensors.unused)} tensors that its model would not use: {names(tensors.unused)}{cause}"
            f"; mend the checkpoint{way}",
            consent="allow_unused_weights" if flag else "",
        )


def not_compared(reason: str) -> str:
    """The warning where `Tensors.unknown` has a reason."""
    return f"the tensors of the checkpoint could not be compared with its model before they are loaded: {reason}"


def _empty(checkpoint: Checkpoint, auto_class: str) -> Any:
    """The base as the model that the adapter makes of it, on the `meta` device."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(checkpoint.path), num_labels=1)
    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config)


def _own_kind(checkpoint: Checkpoint) -> str:
    """The class that the base's own `config.json` names; an adapter may make another of it."""
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    return str((config.get("architectures") or [""])[0])


def names(tensors: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(tensors) - most} more" if len(tensors) > most else ""
    return ", ".join(tensors[:most]) + more


def _cause(checkpoint: Checkpoint, tensors: Tensors) -> str:
    """What most likely went wrong, as the end of a sentence; empty where nothing is known."""
    unused, config = tensors.unused, checkpoint.config
    if tensors.missing == ("lm_head.weight",) and not tensors.mismatched and not unused:
        return '; most likely its head is the embedding, and config.json lacks "tie_word_embeddings": true'
    if prefix := _prefix(tensors):
        return f"; the files have all names with {prefix!r} in front, as a wrapper gives them: save the model inside it"
    if any(_SCALES.search(name) for name in unused) and "quantization_config" not in config:
        return "; it looks quantised, and its config.json has lost the quantization_config"
    if cause := _biases(unused, checkpoint) or _sizes(checkpoint, tensors):
        return cause
    if tensors.untied:
        return (
            f"; {tensors.untied} differs from the embedding, but config.json ties the two: set "
            '"tie_word_embeddings" to false if the file is right'
        )
    if any("lora_" in name or ".base_layer." in name for name in unused):
        return "; it looks like an adapter that was saved without being merged"
    if unused and all(_OTHER_HEAD.search(name) for name in unused):
        return f"; this is the head of another kind of model than the {checkpoint.architecture or 'one in config.json'}"
    if layers := _layers(unused):
        return f"; config.json says fewer layers than the files have (num_hidden_layers; the files have {layers})"
    return ""


def _unlisted(checkpoint: Checkpoint, missing: Sequence[str]) -> str:
    """The file beside the weights that holds what is missing, where the index leaves it out."""
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        if file not in checkpoint.weight_files:
            with suppress(OSError, ValueError):
                if any(name in _header(file)[1] for name in missing):
                    return f"; {file.name} holds some of them, and the index does not name that file: download it again"
    return ""


def _prefix(tensors: Tensors) -> str:
    """What stands before the names of all tensors in the files; empty where they are named otherwise."""
    for lost in tensors.missing:
        for name in tensors.unused:
            prefix = name.removesuffix(lost)
            if prefix != name and prefix.endswith(".") and all(name.startswith(prefix) for name in tensors.unused):
                return prefix
    return ""


def _integers(checkpoint: Checkpoint, model: Any) -> tuple[str, ...]:
    """Parameters of the model that the files have as whole numbers, where no quantisation is stated."""
    if "quantization_config" in checkpoint.config:
        return ()
    head = f"{model.base_model_prefix}."
    parameters = {name.removeprefix(head) for name, _ in model.named_parameters()}  # a buffer may hold whole numbers
    kinds = {name: entry["dtype"] for file in checkpoint.weight_files for name, entry in _header(file)[1].items()}
    return tuple(
        sorted(n for n, kind in kinds.items() if _INTEGERS.fullmatch(kind) and n.removeprefix(head) in parameters)
    )


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of the header of a safetensors file, and name -> dtype, shape and place of each tensor."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return length, header


def _biases(unused: Sequence[str], checkpoint: Checkpoint) -> str:
    """The settings that would give the model the biases that are left over; empty where other tensors are too."""
    if not unused or not all(name.endswith(".bias") for name in unused):
        return ""
    attention = {name.rsplit(".", 2)[1] for name in unused if re.search(r"attn|attention", name)}
    mlp = any(re.search(r"\.(?:mlp|feed_forward|block_sparse_moe)\.|\.experts\.", name) for name in unused)
    if attention == {"q_proj", "k_proj", "v_proj"}:
        return '; Qwen2 has biases on q, k and v alone: config.json most likely names the wrong "model_type"'
    flags = [flag for flag, there in (("attention_bias", bool(attention)), ("mlp_bias", mlp)) if there]
    known = _settings(checkpoint)
    if strange := [flag for flag in flags if flag not in known]:
        kind = checkpoint.config.get("model_type")
        return f"; the model_type {kind!r} in config.json has no {strange[0]}, so it is most likely the wrong one"
    return f"; most likely config.json lacks {' and '.join(f'{chr(34)}{f}{chr(34)}: true' for f in flags)}" * bool(
        flags
    )


def _settings(checkpoint: Checkpoint) -> Collection[str]:
    """Names that the config class of transformers knows; where it knows no such type, those that are looked for."""
    from transformers import CONFIG_MAPPING

    try:
        return dir(CONFIG_MAPPING[str(checkpoint.config.get("model_type"))]())
    except Exception:  # an unknown type, or one that cannot be made of its defaults
        return {"attention_bias", "mlp_bias"}


def _sizes(checkpoint: Checkpoint, tensors: Tensors) -> str:
    """The setting that tensors of another shape speak of, or the experts that are left over; empty where unclear."""
    experts = [int(match[1]) for name in tensors.unused if (match := re.search(r"\.experts\.(\d+)\.", name))]
    if experts and len(experts) == len(tensors.unused):
        return f"; config.json says fewer experts than the files have ({max(experts) + 1})"
    for setting, pattern in _SIZES.items():
        if tensors.mismatched and all(re.search(pattern, name) for name in tensors.mismatched):
            return f"; most likely {setting} in config.json is not that of the files"
    return ""


def _layers(unused: Collection[str]) -> int:
    numbers = [int(match[1]) for name in unused if (match := re.search(r"\.(?:layers|h|blocks?)\.(\d+)\.", name))]
    whole = {n for n in numbers if sum(number == n for number in numbers) >= 4}  # not one left-over buffer a layer
    return max(whole) + 1 if whole and len(whole) < 1 + max(whole) else 0


def _untied(checkpoint: Checkpoint) -> str | None:
    """The name of an output head whose values are not those of the embedding; reads these two tensors."""
    shapes = checkpoint.tensor_shapes()
    head = next((name for name in shapes if name in _LM_HEAD or name.endswith(".lm_head.weight")), None)
    embedding = next((name for name in shapes if name.endswith(_EMBEDDINGS)), None)
    if head is None or embedding is None:
        return None
    same = shapes[head] == shapes[embedding] and _values(checkpoint, head) == _values(checkpoint, embedding)
    return None if same else head


def _values(checkpoint: Checkpoint, tensor: str) -> tuple[str, bytes]:
    """Dtype and a digest of the bytes of a tensor."""
    import hashlib

    for file in checkpoint.weight_files:
        length, header = _header(file)
        if tensor in header:
            begin, end = header[tensor]["data_offsets"]
            digest, left = hashlib.sha256(), end - begin
            with file.open("rb") as stream:
                stream.seek(8 + length + begin)
                while left and (block := stream.read(min(left, 1 << 24))):
                    digest.update(block)
                    left -= len(block)
            return str(header[tensor]["dtype"]), digest.digest()
    return "", b""
