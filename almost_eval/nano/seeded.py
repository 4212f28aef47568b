"""Builds small Llama checkpoints with random weights: real files for the engines to load, with no download.

A checkpoint is a plain Hugging Face folder: a byte-level BPE tokenizer trained on the nano world's text, a
configuration, float32 safetensors. The same settings and package versions give the same bytes. It answers at chance;
the trained models of the nano world replace it.

torch and transformers are imported where a checkpoint is built, so that finding a cached one costs neither.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import ModelError, did_you_mean
from almost_eval.files import whole_folder
from almost_eval.nano.data import cached
from almost_eval.nano.documents import tokenizer_text as world_text
from almost_eval.nano.tables import digest as world_digest
from almost_eval.nano.world import World
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CHECKPOINTS: dict[str, JSONObject] = {"nano/seeded": {}, "nano/seeded-reward": {"reward": True}}
"""Built-in name -> settings of `build_checkpoint`."""

BOS, EOS, PAD = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")  # token ids 0, 1, 2
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # every byte is a token, so any text can be encoded


def checkpoint(name: str) -> Path:
    """The folder of a built-in checkpoint in the cache, built on first use."""
    if name not in CHECKPOINTS:
        raise ModelError(f"no built-in checkpoint {name!r}: {did_you_mean(name, CHECKPOINTS)}")
    settings = (build_checkpoint.__kwdefaults__ or {}) | CHECKPOINTS[name]
    made_with = {package: version(package) for package in ("tokenizers", "torch", "transformers")}
    key = json.dumps([settings, made_with, world_digest(World())], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return cached(f"{name.replace('/', '-')}-{digest[:12]}", partial(build_checkpoint, **settings))


def build_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    vocab_size: int = 1024,
    max_position_embeddings: int = 2048,
    initializer_range: float = 0.08,
    reward: bool = False,
    tokenizer_text: Iterable[str] | None = None,
) -> Path:
    """Write a checkpoint to `path`, which must be new or empty; with `reward`, a one-label sequence classifier.

    The weights are four times wider than usual (0.08, not 0.02): at the usual width a model this small gives nearly
    the same probability to every token, and a mix-up between two of them would not show.
    The tokenizer stops short of `vocab_size` where its text runs out of pairs to merge; the model keeps the size.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    # 1. The tokenizer.
    if vocab_size < MIN_VOCAB_SIZE:
        raise ModelError(f"vocab_size is {vocab_size}: a byte-level tokenizer needs {MIN_VOCAB_SIZE} or more")
    text = world_text(World()) if tokenizer_text is None else tokenizer_text
    tokenizer = train_tokenizer(text, vocab_size=vocab_size, model_max_length=max_position_embeddings)

    # 2. The model.
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=64 * math.ceil(hidden_size * 8 / 3 / 64),  # Llama's ratio, rounded up
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,  # a classifier finds the last real token by it
    )
    if reward:
        config.num_labels = 1
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it would also reseed the GPUs, whose state is not saved here.
        torch.default_generator.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)

    # 3. The folder.
    with whole_folder(path) as folder, _no_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return path


@contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers draws a bar even for one small file."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def byte_level_bpe(text: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer of the package `tokenizers`, trained: every byte is a token, so it loses nothing of any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def train_tokenizer(text: Iterable[str], *, vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before every text and loses nothing; it has no chat template."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level_bpe(text, vocab_size, SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token types
        clean_up_tokenization_spaces=False,  # decoding must give the text back as it was
    )
