"""A PEFT adapter and its base as one whole checkpoint, for programs that take no adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from almost_eval.errors import InputError
from almost_eval.models.checkpoint import CAUSAL, Checkpoint, find_checkpoint
from almost_eval.models.loading import load_tokenizer, load_weights
from almost_eval.models.tensors import check_weights
from almost_train.common.lora import BASE, LoraSettings, base_dtype
from almost_train.common.processes import WORK, is_main, wait_for_all

if TYPE_CHECKING:
    import torch

_HEAD = "SequenceClassification"
_WEIGHTS_AND_SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
"""What the merged model writes itself."""


def merge(adapter: str, output: Path, dtype: str = "float32", *, just_trained: bool = False) -> Path:
    """Write the base of an adapter with the adapter in its weights, and the tokenizer that belongs to it.

    Args:
        adapter: the folder with `adapter_config.json`.
        output: the new checkpoint's folder; absent or empty.
        dtype: of the weights, which are merged in float32.
        just_trained: the stage that merges has written the adapter from a base and a tokenizer that it had checked.
            They are not checked again: with 262,144 tokens that takes two thirds of the time.

    Raises:
        InputError: no adapter, or `output` holds something.
        ModelError: the adapter cannot be read or does not fit its base.
    """
    import torch
    import transformers

    # 1. What is refused without weights.
    checkpoint = find_checkpoint(adapter, architectures=(*CAUSAL, _HEAD))
    if checkpoint.adapter is None:
        raise InputError(f"{checkpoint.path} is a whole checkpoint; there is nothing to merge")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} holds something already; give --output a new folder")
    if not just_trained:
        load_tokenizer(checkpoint)
    scores = checkpoint.brings_head or _HEAD in checkpoint.architecture
    kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    if not just_trained:
        check_weights(checkpoint, kind)

    # 2. The merged model, beside its place until it is whole.
    model = load_weights(
        getattr(transformers, kind),
        checkpoint,
        dtype=getattr(torch, dtype),
        device="cpu",
        attention="auto",
        trust_remote_code=False,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        _copy_tokenizer(checkpoint, folder)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return output


def training_base(
    checkpoint: Checkpoint, output: Path, settings: LoraSettings, *, bf16: bool, whole: bool = False
) -> Checkpoint:
    """What training starts from: whole weights on disk, where the trainer or a new adapter needs them.

    Args:
        checkpoint: as the user named it; it may be an adapter.
        output: the stage's folder. Weights that a new adapter names stay in its `base/`; others go when it is done.
        settings: whether an adapter is trained.
        bf16: whether the stage computes in bfloat16.
        whole: whether the trainer needs whole weights without an adapter too.
    """
    if not (settings.lora_rank or whole):
        return checkpoint
    folder = output / BASE if settings.lora_rank else output / WORK / BASE
    return whole_base(checkpoint, folder, base_dtype(settings, bf16=bf16))


def whole_base(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint to put a new adapter on: where it is an adapter itself, it is merged into its base first.

    Args:
        checkpoint: what training starts from.
        folder: gets the merged weights, if they are needed and not there; the main process writes.
        dtype: of these.

    Raises:
        ModelError: see `merge`.
    """
    if checkpoint.adapter is None:
        return checkpoint
    if is_main() and not folder.exists():
        merge(str(checkpoint.adapter.path), folder, str(dtype).removeprefix("torch."))
    wait_for_all()
    return find_checkpoint(str(folder), architectures=(*CAUSAL, _HEAD))


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The very files: a tokenizer that is saved anew may be another one."""
    own = "adapter/" if checkpoint.tokenizer_folder != checkpoint.path else ""
    for name in checkpoint.file_digests():
        mine = name.startswith("adapter/")
        name = name.removeprefix("adapter/")
        if mine == bool(own) and name not in _WEIGHTS_AND_SETTINGS:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.tokenizer_folder / name, folder / name)
