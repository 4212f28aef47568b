"""The configuration of a model that a plan is made of: a folder's, a built-in model's, a published one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import AlmostError, InputError
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import BUILT_IN

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PUBLISHED = Path(__file__).parents[1] / "recipes" / "configs.json"
"""Sizes of the models that the built-in recipes name, so that a plan needs no network."""
ANY = ("",)
"""Every kind of model."""


def load_config(model: str) -> PretrainedConfig:
    """The configuration of a model; no weight is read, and for a hub id nothing but `config.json` is fetched.

    Raises:
        InputError: it is not on this machine, not among the published ones, and cannot be fetched.
    """
    from transformers import AutoConfig

    from almost_eval.models.loading import quiet_transformers

    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    if model in published:
        return AutoConfig.for_model(**published[model])
    if model in BUILT_IN or Path(model).is_dir():
        path = str(find_checkpoint(model, architectures=ANY).path)
    elif model.count("/") == 1 and not model.startswith((".", "~", "/", "nano/")):
        path = model
    else:
        find_checkpoint(model, architectures=ANY)  # says what is wrong with the name
        path = model
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(path)
    except AlmostError:
        raise
    except Exception as error:  # of the network, of the hub, of the file: many kinds
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"no configuration of {model!r} ({first:.120}); give a folder with its config.json in its place"
        ) from None


def local_folder(model: str) -> Path | None:
    """The folder of a model whose weights are on this machine, or None."""
    if model in BUILT_IN or Path(model).is_dir():
        return find_checkpoint(model, architectures=ANY).path
    return None


def cache_bytes(config: PretrainedConfig, tokens: int, bytes_each: int) -> int:
    """Bytes of keys and values of so many tokens: 2 x layers x key-value heads x head size (arXiv 2309.06180, 2.2).

    Sliding windows are counted as full: transformers keeps all tokens while a window is not full.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * tokens * bytes_each)
