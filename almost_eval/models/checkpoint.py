"""A model on disk: find it, refuse what is unsafe or not a model, and say exactly which weights it is.

Nothing here loads a weight or imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from almost_eval.errors import ModelError, did_you_mean, problem_of
from almost_eval.models.adapters import CONFIG, FILES, Adapter, merge_command, open_adapter
from almost_eval.nano import BUILT_IN, DEFAULT_MODEL, SEEDED, SHIPPED, shipped
from almost_eval.types import JSONObject

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"  # what transformers loads, the first that exists
# Its name for pickled weights; an optimizer's state or training_args.bin are no weights.
_PICKLES = "pytorch_model*.bin"
_WEIGHTS = ("*.safetensors", _PICKLES)
_LFS = b"version https://git-lfs"
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin")
"""Names of pickles that vLLM leaves out."""
_BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),  # vocabularies of other kinds of tokenizers
    *("sentence_bert_config.json", "processor_config.json", "*.py"),
)
"""What, besides the weights, transformers reads of a checkpoint."""
_FOREIGN = {
    "*.gguf": "GGUF",
    "*.onnx": "ONNX",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "consolidated*": "the maker's own shards",
}
"""Files of weights in other formats -> what the format is called."""
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
    adapter: Adapter | None = None
    """What is merged into the weights; `path`, `config` and `weight_files` are then those of its base."""

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer and its chat template are."""
        return (self.adapter.tokenizer_folder if self.adapter else None) or self.path

    @property
    def architecture(self) -> str:
        """The class that `config.json` names first, or an empty string."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def brings_head(self) -> bool:
        """Whether its adapter brings a score head, which its base need not have."""
        return self.adapter is not None and self.adapter.is_classifier

    def weight_digest(self) -> str:
        """sha256 over the weight files, in the order of their names; read once by a process that leaves them alone.

        An adapter's files follow those of its base.
        """
        states = [(file, file.stat()) for file in (*self.weight_files, *(self.adapter.files if self.adapter else ()))]
        # The time of the last change of the inode too: `cp -p` gives other weights the old time of change.
        times = [(file, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for file, state in states]
        return _sha256(tuple(times))

    def file_digests(self) -> dict[str, str]:
        """File -> sha256, of what stands beside the weights and decides what they compute and read: settings,
        tokenizer, chat template, end tokens, own code. Read anew each time, so that a mended file is another model.
        Those of an adapter stand under `adapter/`, beside those of its base.
        """
        folders = {"": self.path} | ({"adapter/": self.adapter.path} if self.adapter else {})
        return {
            prefix + file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for prefix, folder in folders.items()
            for file in sorted({file for pattern in _BESIDE for file in folder.glob(pattern) if file.is_file()})
        }

    def n_parameters(self) -> int:
        """Numbers in all tensors, read from the safetensors headers alone; 0 for pickles."""
        return sum(map(math.prod, self.tensor_shapes().values()))

    def tensor_names(self) -> set[str]:
        """Names of all tensors, read from the safetensors headers alone; empty for pickles."""
        return {*self.tensor_shapes(), *(self.adapter.shapes if self.adapter else ())}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors, read from the safetensors headers alone; empty for pickles."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.weight_files:
            if file.suffix == ".safetensors":
                shapes |= _tensor_shapes(file)
        return shapes


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
    _refuse_broken_links(path)
    if any((path / file).is_file() for file in FILES):
        adapter = open_adapter(path, has_weights=_has_weights(path), allow_pickle=allow_pickle)
        return _with_base(name, adapter, allow_pickle, architectures)
    config_file = path / "config.json"
    if not config_file.is_file():
        if foreign := _foreign(path):
            raise ModelError(f"{path} {foreign}")
        names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        lacks = "its config.json is a folder" if config_file.is_dir() else f"it has no config.json (found {names})"
        raise ModelError(f"{path} is not a model: {lacks}; give a checkpoint directory")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        kinds = config.get("architectures") or []
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"architectures is {kinds!r}, and no list of names")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{config_file} is not valid JSON for a model: {error}") from None
    if explicit := config.get("transformers_weights"):  # transformers would load it in place of the files checked here
        raise ModelError(f"{config_file} points at weights of its own ({explicit!r}); remove 'transformers_weights'")
    if kinds and not any(part in kind for kind in kinds for part in architectures):
        wanted = " or ".join(f"*{part}*" for part in architectures)
        raise ModelError(f"{path} holds a {kinds[0]}; this needs a {wanted} checkpoint")
    _refuse_bad_ends(path / "generation_config.json")
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise ModelError(
            f"{config_file} states pad_token_id: {pad}, and the model has {rows} tokens; set it to one of them, or null"
        )
    return Checkpoint(name, path, config, _weight_files(path, allow_pickle), allow_pickle)


def _refuse_broken_links(folder: Path) -> None:
    """Raise ModelError where a link in it leads nowhere: it would be read as if that file had never been there."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists() and any(file.match(name) for name in (*_WEIGHTS, *_BESIDE)):
            raise ModelError(
                f"{folder} holds {file.name}, a link to {os.readlink(file)}, which is not there; copy the checkpoint "
                "with what its links lead to, or download it again"
            )


def _refuse_bad_ends(file: Path) -> None:
    """Raise ModelError where it is damaged: transformers then takes other EOS ids without a word."""
    try:
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file} is no JSON object ({problem_of(error)}); download or save it again") from None
    ids = ends if isinstance(ends, list) else [ends]
    if not all(end is None or (isinstance(end, int) and not isinstance(end, bool)) for end in ids):
        raise ModelError(f"{file} states eos_token_id: {ends!r}, which is no token id and no list of them; mend it")


def refuse_adapter(checkpoint: Checkpoint, what: str) -> None:
    """Raise ModelError for an adapter, where `what` can only load whole checkpoints."""
    if checkpoint.adapter:
        raise ModelError(
            f"{checkpoint.adapter.path} is an adapter, and {what} takes whole checkpoints: merge it first with "
            f"{merge_command(checkpoint.adapter)}, and give that folder"
        )


def refuse_stray_weights(checkpoint: Checkpoint) -> None:
    """Raise ModelError where vLLM would take files for weights that are not the checkpoint's.

    Where there is no index, its loader reads every `*.safetensors` of the folder, and without one of those every
    `*.bin`; transformers reads the files by their names.
    """
    files, folder = checkpoint.weight_files, checkpoint.path
    indexed = files[0].suffix == ".safetensors" and (folder / _INDEX).is_file()
    # The maker's own shards of Mistral turn its `auto` to their format, whatever else there is.
    taken = sorted(folder.glob("consolidated*.safetensors" if indexed else "*.safetensors"))
    if not taken and not indexed:
        taken = [file for file in sorted(folder.glob("*.bin")) if not file.name.endswith(_NO_WEIGHTS)]
    if stray := [file.name for file in taken if file not in files]:
        raise ModelError(
            f"{folder} holds {stray[0]}, which is no part of the checkpoint and which vLLM would load: move it out of "
            "the folder, or use the engine hf"
        )


def _has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (_WHOLE, _INDEX)) or any(path.glob(_PICKLES))


def _with_base(name: str, adapter: Adapter, allow_pickle: bool, architectures: Collection[str]) -> Checkpoint:
    """The adapter on its base, which is looked for in the working directory, beside the adapter, then by its name."""
    if not adapter.base:
        raise ModelError(f"{adapter.path / CONFIG} names no base model; set base_model_name_or_path to its folder")
    beside = adapter.path / adapter.base
    base = str(beside) if _existing(adapter.base) is None and beside.is_dir() else adapter.base
    if (folder := _existing(base)) is not None and (folder / CONFIG).is_file() and not _has_weights(folder):
        what = "itself" if folder.resolve() == adapter.path.resolve() else f"{folder}, an adapter too"
        raise ModelError(f"the base of the adapter {adapter.path} is {what}; name a whole model, or merge that first")
    scores = tuple(architectures) != CAUSAL and adapter.is_classifier
    if tuple(architectures) == CAUSAL and adapter.is_classifier:
        raise ModelError(f"{adapter.path} is an adapter of a classifier (SEQ_CLS); this needs one of a language model")
    try:
        of = find_checkpoint(
            base, allow_pickle=allow_pickle, architectures=(*architectures, *CAUSAL) if scores else architectures
        )
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapter {adapter.path} cannot be used: {error} (base_model_name_or_path in "
            f"{CONFIG} is {adapter.base!r})",
            error.consent,
        ) from None
    if of.adapter:  # on the hub
        raise ModelError(f"the base of the adapter {adapter.path} is an adapter too; merge that one and save the model")
    config = of.config
    heads = [shape[0] for key, shape in adapter.shapes.items() if key.endswith(".score.weight")]
    if scores and heads:
        kind = of.architecture.replace("ForCausalLM", "ForSequenceClassification")
        config = {**config, "num_labels": heads[0], "architectures": [kind]}
        config.pop("id2label", None)
    return Checkpoint(name, of.path, config, of.weight_files, allow_pickle, adapter)


def _locate(name: str, allow_pickle: bool) -> Path:
    if name in SHIPPED:
        return shipped(name)
    if name in SEEDED:
        from almost_eval.nano.seeded import checkpoint

        return checkpoint(name)
    path = _existing(name)
    if path is not None and path.is_dir():
        folder = path.resolve()
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise ModelError(
                f"the name of {folder} is no UTF-8, and tokenizers reads no such file; rename it"
            ) from None
        return folder
    if path is not None:
        if path.suffix == ".gguf":
            raise ModelError(f"{path} is a GGUF file, which is not read here; give the original checkpoint's folder")
        raise ModelError(f"{path} is a file; give the checkpoint directory that holds config.json and *.safetensors")
    if name.startswith("nano/"):
        raise ModelError(f"no built-in model {name!r}; {did_you_mean(name, BUILT_IN)}")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"no model at {name!r}: give a checkpoint directory, a hub id (org/name) or {DEFAULT_MODEL}")
    return _download(name, allow_pickle)


def _existing(name: str) -> Path | None:
    """The file or folder of that name, or None.

    Raises:
        ModelError: there can be none of such a name.
    """
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, the home of nobody
        raise ModelError(f"no model at {name!r}: {error}") from None


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
    others = sorted(file.name for file in path.glob("model*.safetensors") if file.name != _WHOLE)
    if (path / _WHOLE).is_file() and (index.is_file() or others):
        # transformers would load the whole file, vLLM the shards: one of the two is stale.
        raise ModelError(
            f"{path} holds {_WHOLE} and beside it {index.name if index.is_file() else others[0]}: two sets of weights; "
            f"remove the one that is not meant (transformers would load {_WHOLE})"
        )
    if (path / _WHOLE).is_file():
        files = [path / _WHOLE]
    elif index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            shards = sorted({str(shard) for shard in content["weight_map"].values()})
            if not isinstance(content.get("metadata"), dict):
                raise ValueError('it lacks "metadata": {}, without which transformers does not read it')
            if not shards:
                raise ValueError("its weight_map names no file")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a valid index: {problem_of(error)}; download it again") from None
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise ModelError(f"{index} names {outside[0]!r}, which is not a file of its own folder; download it again")
        files = [path / shard for shard in shards]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(f"{path} lacks {len(missing)} of {len(files)} weight files, first {missing[0]}")
    place: dict[str, str] = {}
    for file in files:
        for tensor in _tensor_shapes(file):
            if (other := place.setdefault(tensor, file.name)) != file.name:  # engines differ in which of the two wins
                raise ModelError(
                    f"{path} holds {tensor!r} twice, in {other} and in {file.name}: shards of two checkpoints; "
                    "download or save it again"
                )
    if files:
        return tuple(files)
    pickles = sorted(path.glob(_PICKLES))
    if pickles and allow_pickle:
        return tuple(pickles)
    if pickles:
        raise ModelError(
            f"{path} has only pickled weights ({pickles[0].name}), which can run code when loaded; convert them to "
            "safetensors, or accept pickled weights if you trust their source",
            consent="allow_pickle",
        )
    if foreign := _foreign(path):
        raise ModelError(f"{path} {foreign}")
    if others:
        raise ModelError(f"{path} holds {others[0]} but no {_INDEX}, which says what belongs to it; download that too")
    raise ModelError(f"{path} has a config.json but no {_WHOLE} or {_INDEX}; download or save the weights there")


def _foreign(path: Path) -> str | None:
    """What to say of a folder that has weights in a format which is not read here; None where it has none."""
    for pattern, kind in _FOREIGN.items():
        if files := sorted(path.glob(pattern)):
            return (
                f"holds weights as {kind} ({files[0].name}), which are not read here; give the folder of the original "
                f"checkpoint, with config.json and {_WHOLE}, or serve it elsewhere and use the engine openai"
            )
    return None


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file, from its header alone.

    Raises:
        ModelError: the file is not whole: what its own package would refuse to load.
    """
    from safetensors import safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an error of its own, without a base
        problem, cure = str(error), "download or save it again"
        with suppress(OSError), file.open("rb") as stream:
            if stream.read(len(_LFS)) == _LFS:
                problem, cure = "it is a pointer of Git LFS", "get its content with `git lfs pull`"
        raise ModelError(f"{file} is not a whole safetensors file ({problem}); {cure}") from None


def context_length(config: JSONObject, tokenizer: object = None) -> int:
    """Tokens the model can attend to, read as lm-eval reads it: the config, else the tokenizer, else 2,048."""
    text = config.get("text_config") or config
    for attribute in ("n_positions", "max_position_embeddings", "n_ctx"):
        if text.get(attribute) is not None:
            return int(text[attribute])
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < 10**12 else 2048
