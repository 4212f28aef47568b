"""The options that say how a model is run: one list for every command, and one way from it to `EngineOptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from almost_eval.engines.build import EngineOptions
    from almost_eval.models.chat import ChatTemplate


def _count_or_auto(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of at least 1")
    return int(value)


_COUNT = click.IntRange(min=1)
_ABOVE_0 = click.FloatRange(min=0, min_open=True)

ENGINE_OPTIONS = [
    click.option("--engine", help="What runs the model: hf, vllm, or openai (a served model).  [hf]"),
    click.option("--base-url", help="openai: the endpoint, up to and with /v1. [env: OPENAI_BASE_URL]"),
    click.option("--tokenizer", help="openai: checkpoint with the model's tokenizer.  [the server's own, where local]"),
    click.option("--concurrency", type=_COUNT, help="openai: requests at a time.  [32]"),
    click.option("--timeout", type=_ABOVE_0, help="openai: seconds that one answer may take.  [600]"),
    click.option("--dtype", default="auto", show_default=True, help="hf, vllm: auto, float32, bfloat16 or float16."),
    click.option("--device", default="auto", show_default=True, help="hf: auto, cpu, cuda, cuda:1, mps."),
    click.option("--attention", default="auto", show_default=True, help="hf: auto, sdpa, eager or flash_attention_2."),
    click.option(
        "--batch-size",
        default="auto",
        show_default=True,
        callback=_count_or_auto,
        help="hf, vllm: sequences in a forward pass.",
    ),
    click.option("--batch-tokens", default="auto", callback=_count_or_auto, help="hf, vllm: tokens in a forward pass."),
    click.option("--max-length", type=click.IntRange(min=2), help="Context length, below the model's own."),
    click.option("--share-prefixes/--no-share-prefixes", default=True, help="hf: compute shared prefixes once."),
    click.option("--tensor-parallel-size", type=_COUNT, help="vllm: devices that share each layer.  [1]"),
    click.option("--pipeline-parallel-size", type=_COUNT, help="vllm: devices that share the layers out.  [1]"),
    click.option(
        "--gpu-memory", type=click.FloatRange(0, 1, min_open=True), help="vllm: share of the GPU's memory it may take."
    ),
    click.option("--kv-cache-gib", type=_ABOVE_0, help="vllm: GiB of keys and values.  [CPU: 1]"),
    click.option("--allow-pickle", is_flag=True, help="hf, vllm: accept pickled weights, which can run code."),
    click.option("--trust-remote-code", is_flag=True, help="hf, vllm: run Python code that the checkpoint ships."),
]
"""Everything but the model itself."""


def engine_options(given: Mapping[str, Any]) -> EngineOptions:
    """What a command was given of `ENGINE_OPTIONS`; what is None is the engine's own choice."""
    from almost_eval.engines.build import EngineOptions

    names = {field.name for field in fields(EngineOptions)}
    return EngineOptions(**{name: value for name, value in given.items() if name in names and value is not None})


REWARD_MODELS = {
    "hf": "almost_eval.rewards.hf:HFRewardModel",
    "vllm": "almost_eval.rewards.vllm:VLLMRewardModel",
    "openai": "almost_eval.rewards.http:HTTPRewardModel",
}
"""Name of an engine -> the class that gives its rewards."""


def reward_model(model: str | None, options: EngineOptions, template: ChatTemplate | None = None) -> Any:
    """The reward model on the engine of `options`. No weight is loaded; a server is asked what it is.

    Args:
        model: checkpoint directory, hub id or built-in name; for `openai` the served name, or None for whichever.
        options: which engine, and how.
        template: how a conversation is written; None is the model's own.

    Raises:
        InputError: an unknown engine, or an option that it does not take; whatever the reward model refuses.
        MissingDependencyError: the engine's package is not installed.
    """
    from importlib import import_module

    from almost_eval.engines.build import SCORERS_TAKE, engine_arguments

    takes = {engine: names - {"data_parallel_size"} for engine, names in SCORERS_TAKE.items()}
    arguments = engine_arguments(options, takes, "reward model on")
    arguments.pop("share_prefixes", None)  # hf's: rewards have no prefixes to share, so both values mean the same
    module, _, cls = REWARD_MODELS[options.engine].partition(":")
    found = getattr(import_module(module), cls)(model, template=template, **arguments)
    if hasattr(found, "check"):
        found.check()
    return found
