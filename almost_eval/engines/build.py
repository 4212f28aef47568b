"""Which engine runs a model: one set of options for all engines, and the table of engines.

An option that the chosen engine does not take is refused, not ignored. The command line imports this file, so the
engines themselves are imported where one is built.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine
from almost_eval.errors import InputError, MissingDependencyError, did_you_mean
from almost_eval.models.loading import Purpose
from almost_eval.nano import BUILT_IN
from almost_eval.types import JSONObject

if TYPE_CHECKING:  # the command line imports this file
    from almost_eval.models.held import HeldCheckpoint
    from almost_eval.workers.pool import Pool
    from almost_eval.workers.work import Servant, Transport

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

_LIBRARIES = ("torch", "transformers.modeling_utils", "transformers.models.auto.auto_factory")
"""What is imported before workers are forked."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flag:
    """What an option says on the command line, and which values it takes there. The flag is the option's name."""

    help: str
    """Empty where the option has no flag."""
    kind: type = str
    """`str`, `int`, `float`, or `bool` for a switch."""
    least: int | None = None
    """The smallest value of an `int`."""
    above: float | None = None
    """A bound that a `float` must exceed."""
    most: float | None = None
    """The largest value of a `float`."""
    is_shown: bool = False
    """The help states the default. A flag that does not is None where it is left out: the engine's own choice."""
    is_auto: bool = False
    """None is spelled `auto`."""
    is_repeatable: bool = False
    """Given several times, the values are one string with commas."""
    bare: str | None = None
    """The value where the flag stands alone; None where it needs one."""


def _option(
    default: T, help: str, *, engines: Sequence[str], to_score: Sequence[str] = (), kind: type = str, **flag: Any
) -> T:
    """A field of `EngineOptions`: its default, a `Flag`, and the engines that take it (`to_score`: only to score)."""
    metadata = {"flag": Flag(help, kind, **flag), "engines": tuple(engines), "scorers": (*engines, *to_score)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is run: every option with its default, its flag and the engines that take it.

    Defaults are what each engine would choose. The command line makes its flags of these fields.
    """

    engine: str = _option("hf", "What runs the model: hf, vllm, or openai (a served model).  [hf]", engines=())
    """A name in `ENGINES`."""
    base_url: str | None = _option(
        None,
        "openai: the endpoint, up to and with /v1; repeat it for several that serve the model. [env: OPENAI_BASE_URL]",
        engines=["openai"],
        is_repeatable=True,
    )
    tokenizer: str | None = _option(
        None,
        "openai: checkpoint with the model's tokenizer.  [the server's own, where local]",
        engines=(),
        to_score=["openai"],
    )
    concurrency: int = _option(32, "openai: requests at a time.  [32]", engines=["openai"], kind=int, least=1)
    timeout: float = _option(
        600.0, "openai: seconds that one answer may take.  [600]", engines=["openai"], kind=float, above=0
    )
    dtype: str = _option("auto", "hf, vllm: auto, float32, bfloat16 or float16.", engines=["hf", "vllm"], is_shown=True)
    """`auto` is float32 on a CPU and the checkpoint's own elsewhere; to generate, see `pick_dtype`."""
    device: str = _option("auto", "hf: auto, cpu, cuda, cuda:1, mps.", engines=["hf"], is_shown=True)
    attention: str = _option("auto", "hf: auto, sdpa, eager or flash_attention_2.", engines=["hf"], is_shown=True)
    batch_size: int | None = _option(
        None,
        "hf, vllm: sequences in a forward pass.",
        engines=["hf", "vllm"],
        kind=int,
        least=1,
        is_auto=True,
        is_shown=True,
    )
    batch_tokens: int | None = _option(
        None, "hf, vllm: tokens in a forward pass.", engines=["hf", "vllm"], kind=int, least=1, is_auto=True
    )
    max_length: int | None = _option(
        None, "Context length, below the model's own.", engines=["hf", "vllm"], to_score=["openai"], kind=int, least=2
    )
    """For openai: below the server's."""
    share_prefixes: bool = _option(True, "hf: compute shared prefixes once.", engines=(), to_score=["hf"], kind=bool)
    tensor_parallel_size: int = _option(
        1, "vllm: devices that share each layer.  [1]", engines=["vllm"], kind=int, least=1
    )
    pipeline_parallel_size: int = _option(
        1, "vllm: devices that share the layers out.  [1]", engines=["vllm"], kind=int, least=1
    )
    data_parallel_size: int = _option(
        1, "vllm: refused above 1; workers or a server copy the model.  [1]", engines=["vllm"], kind=int, least=1
    )
    """vLLM's own copies of a model are processes behind its server; the error says what to do instead."""
    quantization: str | None = _option(
        None, "vllm: its method, such as fp8.  [what the checkpoint says]", engines=["vllm"]
    )
    """Other weights, so other numbers: it is a part of the spec."""
    speculative_config: str | Mapping[str, Any] | None = _option(
        None,
        'vllm: as for vLLM: {"method": "ngram", "num_speculative_tokens": 4}; text alone.  [none]',
        engines=["vllm"],
    )
    """JSON, or what it stands for (`vllm_speculative.py`)."""
    gpu_memory: float | None = _option(
        None, "vllm: share of the GPU's memory it may take.", engines=["vllm"], kind=float, above=0, most=1
    )
    """Two engines on one GPU need a share each."""
    kv_cache_gib: float | None = _option(
        None, "vllm: GiB of keys and values.  [CPU: 1]", engines=["vllm"], kind=float, above=0
    )
    """None is 1 on a CPU and what is free elsewhere."""
    workers: int | str | None = _option(
        None,
        "hf, vllm: processes that share the work: a number, or GPUS for one on each GPU.  [1]",
        engines=["hf", "vllm"],
    )
    """Each holds a copy of the model. The numbers are those of one process, so no spec holds it; see `pooled`."""
    worker_timeout: float | None = _option(
        None,
        "hf, vllm: seconds after which workers that say nothing are ended; others get their samples.  [none]",
        engines=["hf", "vllm"],
        kind=float,
        above=0,
    )
    """Longer than a worker takes to load the model, and to write its longest texts."""
    ray: str | None = _option(
        None,
        "hf, vllm: workers on the Ray cluster at HOST:PORT or auto; alone, on this machine.",
        engines=["hf", "vllm"],
        bare="local",
    )
    allow_pickle: bool = _option(
        False, "hf, vllm: accept pickled weights, which can run code.", engines=["hf", "vllm"], kind=bool
    )
    trust_remote_code: bool = _option(
        False, "hf, vllm: run Python code that the checkpoint ships.", engines=["hf", "vllm"], kind=bool
    )
    allow_unused_weights: bool = _option(
        False, "hf, vllm: go on without tensors that the model does not take.", engines=["hf", "vllm"], kind=bool
    )


def _takes(role: str) -> dict[str, set[str]]:
    return {
        name: {option.name for option in dataclasses.fields(EngineOptions) if name in option.metadata[role]}
        for name in ENGINES
    }


TAKES: dict[str, set[str]] = _takes("engines")
"""Name of an engine -> the options that mean something to it."""

SCORERS_TAKE: dict[str, set[str]] = _takes("scorers")
"""The same for `SCORERS`."""


def generation_engine(model: str, options: EngineOptions | None = None) -> GenerationEngine:
    """The engine that continues prompts with `model`. No weight is loaded; an endpoint must answer.

    Args:
        model: a checkpoint directory, hub id or built-in name; for `openai` the name the endpoint serves it under.
        options: which engine, and how.

    Raises:
        InputError: an unknown engine, or an option that it does not take; whatever the engine refuses.
        MissingDependencyError: the engine's package is not installed.
    """
    engine = _build(model, options, ENGINES, TAKES, "generate")
    assert isinstance(engine, GenerationEngine)
    return engine


def loglikelihood_engine(model: str, options: EngineOptions | None = None) -> LoglikelihoodEngine:
    """The engine that scores continuations with `model`, and continues prompts too; see `generation_engine`.

    Whether an endpoint can score is known from `check_scores`, before the first score at the latest.

    Raises:
        InputError: whatever `generation_engine` refuses.
        MissingDependencyError: the engine's package is not installed.
    """
    engine = _build(model, options, SCORERS, SCORERS_TAKE, "score")
    assert isinstance(engine, LoglikelihoodEngine)
    return engine


def engine_arguments(options: EngineOptions, takes: Mapping[str, set[str]], what: str = "engine") -> JSONObject:
    """The options that differ from their defaults, for the class of `options.engine`; an error calls it `what`.

    Raises:
        InputError: an unknown engine, or an option that it does not take.
        MissingDependencyError: the engine's package is not installed.
    """
    name = options.engine
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; {did_you_mean(name, ENGINES)}")
    changed = {
        option.name: getattr(options, option.name)
        for option in dataclasses.fields(options)
        if option.name != "engine" and getattr(options, option.name) != option.default
    }
    if unused := sorted(changed.keys() - takes[name]):
        able = " or ".join(engine for engine in ENGINES if unused[0] in takes[engine])
        other = f", or use the engine {able}" if able else ""
        raise InputError(f"the {what} {name!r} takes no {unused[0]}; leave it out{other}")
    if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
        package, line = PACKAGES[name]
        raise MissingDependencyError(f"the engine {name!r} needs the package {package!r}; install it with: {line}")
    return changed


def load_class(path: str) -> type:
    """The class at a path such as `almost_eval.engines.hf:HFEngine`."""
    module, _, name = path.partition(":")
    cls: type = getattr(importlib.import_module(module), name)
    return cls


def _build(
    model: str,
    options: EngineOptions | None,
    classes: Mapping[str, str],
    takes: Mapping[str, set[str]],
    purpose: Purpose,
) -> object:
    options = options or EngineOptions()
    alone = one_process(options)
    arguments = engine_arguments(alone, takes)
    if purpose == "generate" and options.engine in ("hf", "vllm"):
        arguments["purpose"] = purpose
    cls = load_class(classes[options.engine])
    engine = cls(model, **arguments)
    if hasattr(engine, "check"):  # an endpoint: is it there, and does it serve the model
        engine.check()
    if alone == options:
        return engine
    from almost_eval.engines.pooled import EngineServant, PooledEngine

    return PooledEngine(engine, open_pool(engine, EngineServant, model, arguments, options))


def one_process(options: EngineOptions) -> EngineOptions:
    """The same options without workers.

    Raises:
        InputError: the engine has none, or there is a setting of workers without any.
    """
    alone = dataclasses.replace(options, workers=None, ray=None, worker_timeout=None)
    if options.worker_timeout is not None and options.workers is None and options.ray is None:
        raise InputError("--worker-timeout is of workers: name them with --workers or --ray, or leave it out")
    if options.engine == "openai" and alone != options:
        flag = "ray" if options.ray else "workers"
        raise InputError(
            f"the engine 'openai' takes no {flag}: the endpoint does the work; for several, repeat --base-url"
        )
    return alone


def open_pool(
    model: HeldCheckpoint, servant: Callable[[Any], Servant], name: str, arguments: JSONObject, options: EngineOptions
) -> Pool:
    """The workers that `--workers` and `--ray` describe; they start with the first stream.

    Each opens the model by the same name and arguments as it was opened in this process, and holds it by a servant.

    Raises:
        InputError: there is no room for so many workers.
        MissingDependencyError: Ray is not installed.
    """
    from almost_eval.engines.pooled import ModelRecipe, identity_of
    from almost_eval.workers.local import LocalTransport
    from almost_eval.workers.pool import Pool
    from almost_eval.workers.ray import RayTransport
    from almost_eval.workers.size import local_share, requested

    # What `auto` stands for here: what is recorded is what runs.
    arguments = {**arguments, "dtype": model.dtype, **({"device": model.device} if options.engine == "hf" else {})}
    if name not in BUILT_IN and Path(name).is_dir():
        name = str(Path(name).resolve())  # a worker may be in another folder
    recipe = ModelRecipe(servant, type(model), name, arguments)
    gpus_each = options.tensor_parallel_size * options.pipeline_parallel_size * options.data_parallel_size
    transport: Transport
    if options.ray is None:
        assert options.workers is not None
        share = local_share(options.workers, model.device, gpus_each)
        transport = LocalTransport(
            recipe, share.workers, threads=share.threads, devices=share.devices, modules=_LIBRARIES
        )
        return Pool(transport, silence_s=options.worker_timeout)
    on_gpu = model.device.startswith("cuda")
    transport = RayTransport(recipe, requested(options.workers), address=options.ray, gpus=gpus_each if on_gpu else 0)
    if options.device == "auto" and not on_gpu and transport.has_gpus:
        raise InputError(
            "--ray: the cluster has GPUs and this machine has none, so the model would run on CPUs: run the command on "
            "a node with a GPU, or give --device cpu"
        )
    return Pool(transport, identity_of(model), silence_s=options.worker_timeout)
