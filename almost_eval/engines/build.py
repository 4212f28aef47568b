"""Which engine runs a model: one set of options for all, a table of engines, late imports.

An option that the chosen engine does not know is refused, not ignored: a run must not look like it obeyed.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine
from almost_eval.errors import InputError, MissingDependencyError, did_you_mean

ENGINES: dict[str, str] = {
    "hf": "almost_eval.engines.hf:HFEngine",
    "vllm": "almost_eval.engines.vllm:VLLMEngine",
    "openai": "almost_eval.engines.openai:OpenAIEngine",
}
"""Name of an engine -> where its class is."""

SCORERS: dict[str, str] = {**ENGINES, "openai": "almost_eval.engines.openai_loglikelihood:OpenAIScorer"}
"""The same where continuations are to be scored: an endpoint then needs a tokenizer on this side."""

PACKAGES: dict[str, tuple[str, str]] = {
    "vllm": ("vllm", "pip install 'almost-toolkit[vllm]'"),
    "openai": ("openai", "pip install 'openai>=2.0'"),
}
"""Name of an engine -> the optional package it needs, and the line that installs it."""

_LOADING = {"dtype", "max_length", "batch_size", "batch_tokens", "allow_pickle", "trust_remote_code"}
TAKES: dict[str, set[str]] = {
    "hf": _LOADING | {"device", "attention", "share_prefixes"},
    "vllm": _LOADING
    | {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory", "kv_cache_gib"},
    "openai": {"base_url", "concurrency", "timeout"},
}
"""Name of an engine -> the options that mean something to it."""

SCORERS_TAKE: dict[str, set[str]] = {**TAKES, "openai": TAKES["openai"] | {"tokenizer", "max_length"}}
"""The same for `SCORERS`."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is run. Defaults are what each engine would choose."""

    engine: str = "hf"
    """A name in `ENGINES`."""
    base_url: str | None = None
    """openai: the endpoint, up to and including `/v1`; None is `OPENAI_BASE_URL` of the environment."""
    concurrency: int = 32
    """openai: requests on their way at a time."""
    timeout: float = 600.0
    """openai: seconds that one answer may take."""
    tokenizer: str | None = None
    """openai, to score: where the model's tokenizer is; None is the model's own folder, where it is at hand."""
    dtype: str = "auto"
    """hf, vllm: `auto` is float32 on a CPU and the checkpoint's own elsewhere."""
    device: str = "auto"
    """hf: `cpu`, `cuda`, `cuda:1`, ..."""
    attention: str = "auto"
    """hf: attention implementation of transformers."""
    batch_size: int | None = None
    """hf, vllm: sequences in a forward pass."""
    batch_tokens: int | None = None
    """hf, vllm: token positions in a forward pass."""
    share_prefixes: bool = True
    """hf: compute shared prefixes once."""
    max_length: int | None = None
    """hf, vllm: a context length below the model's own. openai, to score: below the server's."""
    tensor_parallel_size: int = 1
    """vllm: devices that share each layer."""
    pipeline_parallel_size: int = 1
    """vllm: devices, or groups of them, that share the layers out."""
    data_parallel_size: int = 1
    """vllm: refused above 1 in process, with what to do instead."""
    gpu_memory: float | None = None
    """vllm: share of the GPU's memory this engine may take; two engines on one GPU need one each."""
    kv_cache_gib: float | None = None
    """vllm: GiB of keys and values; None is 1 on a CPU and what is free elsewhere."""
    allow_pickle: bool = False
    """hf, vllm: accept pickled weights."""
    trust_remote_code: bool = False
    """hf, vllm: run Python code that the checkpoint ships."""


def generation_engine(model: str, options: EngineOptions | None = None) -> GenerationEngine:
    """The engine that continues prompts with `model`. No weight is loaded; an endpoint is asked whether it is there.

    Args:
        model: a checkpoint directory, hub id or built-in name; for `openai` the name the endpoint serves it under.
        options: which engine, and how.

    Raises:
        InputError: an unknown engine, or an option that it does not take; whatever the engine refuses.
        MissingDependencyError: the engine's package is not installed.
    """
    engine = _build(model, options or EngineOptions(), ENGINES, TAKES)
    if hasattr(engine, "check"):
        engine.check()
    assert isinstance(engine, GenerationEngine)
    return engine


def loglikelihood_engine(model: str, options: EngineOptions | None = None) -> LoglikelihoodEngine:
    """The engine that scores continuations with `model`, and continues prompts too; see `generation_engine`.

    Whether an endpoint can score is asked by `check_scores`, before the first score at the latest.

    Raises:
        InputError: whatever `generation_engine` refuses.
        MissingDependencyError: the engine's package is not installed.
    """
    engine = _build(model, options or EngineOptions(), SCORERS, SCORERS_TAKE)
    if hasattr(engine, "check"):
        engine.check()
    assert isinstance(engine, LoglikelihoodEngine)
    return engine


def engine_arguments(options: EngineOptions, takes: Mapping[str, set[str]], what: str = "engine") -> dict[str, Any]:
    """The options that differ from their defaults, for the class of `options.engine`.

    Args:
        options: as they were given.
        takes: name of an engine -> the options that mean something to it here.
        what: how an error calls what takes them.

    Raises:
        InputError: an unknown engine, or an option that it does not take.
        MissingDependencyError: the engine's package is not installed.
    """
    name = options.engine
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; {did_you_mean(name, ENGINES)}")
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name != "engine" and getattr(options, field.name) != field.default
    }
    if unused := sorted(given.keys() - takes[name]):
        able = " or ".join(engine for engine in ENGINES if unused[0] in takes[engine])
        other = f", or use the engine {able}" if able else ""
        raise InputError(f"the {what} {name!r} takes no {unused[0]}; leave it out{other}")
    if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
        package, line = PACKAGES[name]
        raise MissingDependencyError(f"the engine {name!r} needs the package {package!r}; install it with: {line}")
    return given


def _build(model: str, options: EngineOptions, classes: Mapping[str, str], takes: Mapping[str, set[str]]) -> Any:
    given = engine_arguments(options, takes)
    module, _, cls = classes[options.engine].partition(":")
    return getattr(importlib.import_module(module), cls)(model, **given)
