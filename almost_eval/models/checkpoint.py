"""A model on disk: find it, refuse what is unsafe or not a model, and say exactly which weights it is.

Nothing here loads a weight or imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from almost_eval.errors import ModelError, did_you_mean, problem_of
from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, SEEDED, SHIPPED, shipped
from almost_eval.types import JSONObject

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"  # what transformers loads, the first that exists
_PICKLES = (
    "pytorch_model*.bin"  # its name for pickled weights; an optimizer's state or training_args.bin are no weights
)
_BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *(
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "additional_chat_templates/*",
    ),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),  # vocabularies of other kinds of tokenizers
    *("sentence_bert_config.json", "processor_config.json", "*.py"),
)
"""What, besides the weights, transformers reads of a checkpoint."""
CAUSAL = ("CausalLM", "LMHeadModel")
"""Parts of the class name that the config of a causal language model holds."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Hugging Face checkpoint directory that passed every check that needs no weights."""

    name: str
    """As the user gave it."""
    path: Path
    config: JSONObject
    """`config.json`."""
    weight_files: tuple[Path, ...]
    allow_pickle: bool = False

    @property
    def architecture(self) -> str:
        """The class that `config.json` names first, or an empty string."""
        return str((self.config.get("architectures") or [""])[0])

    def weight_digest(self) -> str:
        """sha256 over the weight files, in the order of their names; read once by a process that leaves them alone."""
        states = [(file, file.stat()) for file in self.weight_files]
        # The time of the last change of the inode too: `cp -p` gives other weights the old time of change.
        times = [(file, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for file, state in states]
        return _sha256(tuple(times))

    def file_digests(self) -> dict[str, str]:
        """File -> sha256, of what stands beside the weights and decides what they compute and read: settings,
        tokenizer, chat template, end tokens, own code. Read anew each time, so that a mended file is another model.
        """
        return {
            file.relative_to(self.path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted({file for pattern in _BESIDE for file in self.path.glob(pattern) if file.is_file()})
        }

    def n_parameters(self) -> int:
        """Numbers in all tensors, read from the safetensors headers alone; 0 for pickles."""
        return sum(
            math.prod(entry["shape"])
            for file in self.weight_files
            if file.suffix == ".safetensors"
            for name, entry in _header(file).items()
            if name != "__metadata__"
        )

    def tensor_names(self) -> set[str]:
        """Names of all tensors, read from the safetensors headers alone; empty for pickles."""
        names: set[str] = set()
        for file in self.weight_files:
            if file.suffix == ".safetensors":
                names |= _header(file).keys() - {"__metadata__"}
        return names


@cache
def _sha256(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Over the contents of files, each with its size and times of change, which tell it from an earlier state."""
    digest = hashlib.sha256()
    for file, *_ in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def find_checkpoint(name: str, *, allow_pickle: bool = False, architectures: Collection[str] = CAUSAL) -> Checkpoint:
    """Resolve a built-in name, a local directory or a hub id, and check it.

    Args:
        name: `nano/...`, a directory, or `org/name` on the hub.
        allow_pickle: accept checkpoints that have only pickled weights; they can run code when loaded.
        architectures: accepted endings or parts of the class name in `config.json`.

    Raises:
        ModelError: missing, not a model, the wrong kind of model, or pickled weights only.
    """
    path = _locate(name, allow_pickle)
    config_file = path / "config.json"
    if not config_file.is_file():
        names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise ModelError(f"{path} is not a model: it has no config.json (found {names}); give a checkpoint directory")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        kinds = [str(kind) for kind in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{config_file} is not valid JSON for a model: {error}") from None
    if explicit := config.get("transformers_weights"):  # transformers would load it in place of the files checked here
        raise ModelError(f"{config_file} points at weights of its own ({explicit!r}); remove 'transformers_weights'")
    if kinds and not any(part in kind for kind in kinds for part in architectures):
        wanted = " or ".join(f"*{part}*" for part in architectures)
        raise ModelError(f"{path} holds a {kinds[0]}; this needs a {wanted} checkpoint")
    return Checkpoint(name, path, config, _weight_files(path, allow_pickle), allow_pickle)


def _locate(name: str, allow_pickle: bool) -> Path:
    if name in SHIPPED:
        return shipped(name)
    if name in SEEDED:
        from almost_eval.nano.seeded import checkpoint

        return checkpoint(name)
    try:
        path = Path(name).expanduser()
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, the home of nobody
        raise ModelError(f"no model at {name!r}: {error}") from None
    if is_dir:
        return path.resolve()
    if exists:
        raise ModelError(f"{path} is a file; give the checkpoint directory that holds config.json and *.safetensors")
    if name.startswith("nano/"):
        raise ModelError(f"no built-in model {name!r}; {did_you_mean(name, BUILT_IN)}")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"no model at {name!r}: give a checkpoint directory, a hub id (org/name) or {DEFAULT_MODEL}")
    return _download(name, allow_pickle)


def _download(name: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Only what is loaded: no other framework's weights, and pickles only where they are allowed and needed.
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        path = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=_hub_offline()))
        if allow_pickle and not any(path.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[*patterns, _PICKLES], local_files_only=_hub_offline())
        return path
    except Exception as error:  # every way a download fails (its exceptions share no base) is one line to the user
        raise ModelError(
            f"no directory {name}, and the hub could not give it ({type(error).__name__}): check the path or the "
            "network, or download the checkpoint and give its directory"
        ) from None


def _hub_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def _weight_files(path: Path, allow_pickle: bool) -> tuple[Path, ...]:
    index = path / _INDEX
    files: list[Path] = []
    if (path / _WHOLE).is_file():
        files = [path / _WHOLE]
    elif index.is_file():
        try:
            shards = sorted(
                {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a valid index: {problem_of(error)}; download it again") from None
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise ModelError(f"{index} names {outside[0]!r}, which is not a file of its own folder; download it again")
        files = [path / shard for shard in shards]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(f"{path} lacks {len(missing)} of {len(files)} weight files, first {missing[0]}")
    for file in files:
        _header(file)
    if files:
        return tuple(files)
    pickles = sorted(path.glob(_PICKLES))
    if pickles and allow_pickle:
        return tuple(pickles)
    if pickles:
        raise ModelError(
            f"{path} has only pickled weights ({pickles[0].name}), which can run code when loaded; convert them to "
            "safetensors, or pass --allow-pickle if you trust their source"
        )
    raise ModelError(f"{path} has a config.json but no {_WHOLE} or {_INDEX}; download or save the weights there")


def _header(file: Path) -> JSONObject:
    """The JSON header of a safetensors file: 8 bytes of length, then the header; then as many bytes as it promises."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header: JSONObject = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size < 8 + length + max(ends, default=0):
            raise ValueError("it is shorter than its header says")
    except (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error}); download or save it again") from None
    return header


def context_length(config: JSONObject, tokenizer: object = None) -> int:
    """Tokens the model can attend to, read as lm-eval reads it: the config, else the tokenizer, else 2,048."""
    text = config.get("text_config") or config
    for attribute in ("n_positions", "max_position_embeddings", "n_ctx"):
        if text.get(attribute) is not None:
            return int(text[attribute])
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < 10**12 else 2048
