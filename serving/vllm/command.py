"""The command that starts vLLM's server for a model: its options, its environment, and why each is what it is.

Pure: nothing here looks at the machine or starts anything. An option of vLLM's that the user sets replaces the one that
would be chosen here.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from almost_eval.engines.vllm_process import CPU_WORKER
from almost_eval.errors import InputError
from almost_eval.models.loading import pick_dtype
from serving.door.hosts import checked_hosts
from serving.models import ServedModel
from serving.vllm.front import KEY, SETTINGS, front_settings
from serving.vllm.middleware import VARIABLE as STOP_VARIABLE

GIB = 2**30
_PROCESSES = 1.5 * GIB  # API server and engine, before any weight: 0.7 GB each, measured
_ONE_THREAD = 16 * 2**20
"""Bytes of float32 weights up to which one thread beats two: at 8 MB it does, at 32 MB not (benchmarks/LOG.md)."""
BASE = "-base"
"""After the name of a served adapter, the name of its base, which vLLM serves beside it."""
_OURS = {"model": "--model", "host": "--host", "port": "--port", "served-model-name": "--served-model-name"}
"""vLLM's options that are options of ours."""


@dataclass(frozen=True, slots=True)
class VLLMCommand:
    """A command line of vLLM's server, and what belongs to it."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    """Besides what is set already; the key is not among them."""
    scheme: str
    headless: bool
    """A further node of several, which has no HTTP server."""
    note: str
    """What was chosen for a CPU and why, in one line; empty elsewhere."""
    needed_bytes: float
    """Memory that it will take, about, on a CPU; 0 elsewhere, where vLLM measures for itself."""

    def shown(self, key: str = "") -> str:
        """The command for a shell, with its environment; `key` stands where the key would."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if key:
            variables.append(f"{KEY}={key}")
        return " ".join([*variables, shlex.join(self.arguments)])


def vllm_command(
    model: ServedModel,
    host: str,
    port: int,
    options: Sequence[str] = (),
    *,
    cpu: bool,
    memory: float,
    environment: Mapping[str, str],
    allowed_hosts: Sequence[str] = (),
    open_metrics: bool = False,
) -> VLLMCommand:
    """The command that serves `model`.

    Args:
        model: what is served.
        host: address to listen on.
        port: port to listen on.
        options: further options of vLLM, as they are.
        cpu: vLLM runs on the CPU here.
        memory: bytes that can be had, or infinity.
        environment: variables that are set already, which stay.
        allowed_hosts: names besides its own that it answers to, and sites whose pages may ask it.
        open_metrics: `/metrics` needs no key.

    Raises:
        InputError: an option that cannot be passed on; a context that the model or the memory does not have.
    """
    user_set = set_options(options)
    _refuse(user_set, model)
    context = _context(model, options)
    chosen: dict[str, str | None] = {
        "generation-config": "vllm",  # the checkpoint's own sampling settings would act unseen
        "load-format": None if model.checkpoint.allow_pickle else "safetensors",
        "shutdown-timeout": "6",  # at 0, vLLM's default, SIGTERM during a stream leaves the server hanging (0.31)
    }
    if model.kind == "reward":
        chosen |= {"runner": "pooling", "pooler-config": '{"use_activation": false}'}  # raw logits, no sigmoid
    if model.chat_template is not None:
        chosen["chat-template"] = model.chat_template
    if adapter := model.checkpoint.adapter:  # on top of its base, and with its tokenizer
        chosen |= {
            "enable-lora": "",
            "max-loras": "1",
            "max-lora-rank": str(adapter.vllm_rank),
            "lora-modules": json.dumps({"name": model.name, "path": str(adapter.path)}),
            "tokenizer": str(adapter.tokenizer_folder) if adapter.tokenizer_folder else None,
        }
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    note, needed = "", 0.0
    if cpu:
        on_cpu, note, needed = _cpu_options(model, context, user_set, memory, environment)
        chosen |= on_cpu
        if not user_set & {"enforce-eager", "compilation-config"}:
            # vLLM compiles its sampling helpers even in eager mode: the first sampled answer then takes 12 s.
            variables["TORCH_COMPILE_DISABLE"] = "1"
        if "VLLM_CPU_OMP_THREADS_BIND" not in environment:
            # `auto` leaves a core idle. Unbound, the engine needs no worker process of its own: one import of vLLM
            # less, which is a third of the start.
            variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if model.weight_bytes <= _ONE_THREAD:
            variables["OMP_NUM_THREADS"] = "1"
    arguments = [sys.executable, "-m", "serving.vllm.main", str(model.checkpoint.path)]
    # The name is the adapter's where there is one: without it, nothing would answer but the base.
    name = f"{model.name}{BASE}" if adapter else model.name
    arguments += ["--served-model-name", name, "--host", host, "--port", str(port)]
    for option, value in chosen.items():
        if value is not None and option not in user_set:
            arguments += [f"--{option}", value] if value else [f"--{option}"]
    if adapter and "lora-target-modules" not in user_set:
        arguments += ["--lora-target-modules", *adapter.target_modules]
    variables = {name: value for name, value in variables.items() if name not in environment}
    if model.stop and model.kind == "policy":
        arguments += ["--middleware", "serving.vllm.middleware.DefaultStop"]  # vLLM adds up all of them
        variables[STOP_VARIABLE] = json.dumps(list(model.stop))
    arguments += ["--middleware", "serving.vllm.front.Front"]  # the last is the outermost
    variables[SETTINGS] = front_settings(host, checked_hosts(allowed_hosts), open_metrics=open_metrics)
    return VLLMCommand(
        (*arguments, *options),
        variables,
        "https" if "ssl-certfile" in user_set else "http",
        "headless" in user_set,
        note,
        needed,
    )


def _cpu_options(
    model: ServedModel, context: int, user_set: set[str], memory: float, environment: Mapping[str, str]
) -> tuple[dict[str, str | None], str, float]:
    """What starts fastest on a CPU, the line that says so, and the memory that it takes in bytes."""
    # Rewards are scores, and stay float32.
    dtype = pick_dtype("auto", model.checkpoint, "cpu", "generate" if model.kind == "policy" else "score")
    # Whoever sets another is counted as float32.
    bytes_of = 0.5 if dtype == "bfloat16" and "dtype" not in user_set else 1.0
    chosen: dict[str, str | None] = {
        "dtype": dtype,
        "enforce-eager": "",  # nothing is compiled: small models also answer 2.5-3x faster so
        "block-size": "32",  # prefixes are reused in whole blocks; the default on a CPU is 128
    }
    if model.kind == "policy":
        # A prompt with a seed must not be read in parts: vLLM sets the request's generator back after each part,
        # which torch's CPU generators cannot (0.31: "CPU Generator does not use offset").
        # The worker is vLLM's own but for the last step of its sampler, which gives the same tokens without a sort of
        # the vocabulary: 13 times as fast for top-p with a seed.
        chosen |= {"no-enable-chunked-prefill": "", "worker-cls": CPU_WORKER}
    chosen["max-num-batched-tokens"] = str(max(4096, context))
    sized = "kv-cache-memory-bytes" in user_set or "VLLM_CPU_KVCACHE_SPACE" in environment
    cache = float(GIB)
    if not sized:
        one = bytes_of * (model.cache_bytes_per_token or 0) * (context + 32)
        # One whole context must fit. The estimate is too high for models with windows or compressed keys, so it does
        # not claim all memory: vLLM then says what it lacks.
        cache = max(GIB, min(one, memory / 2))
        chosen["kv-cache-memory-bytes"] = str(int(cache))
    elif environment.get("VLLM_CPU_KVCACHE_SPACE", "").isdecimal():
        cache = int(environment["VLLM_CPU_KVCACHE_SPACE"]) * GIB
    needed = bytes_of * model.weight_bytes + cache + _PROCESSES
    if needed > memory:
        raise InputError(
            f"too little memory for {model.name}: about {needed / GIB:.1f} GiB are needed ({cache / GIB:.1f} of them "
            f"for keys and values), {memory / GIB:.1f} GiB can be had; end other processes, or pass "
            "--kv-cache-memory-bytes and --max-model-len, or a smaller model"
        )
    said = {
        "dtype": dtype,
        "enforce-eager": "eager mode",
        "block-size": "blocks of 32",
        "kv-cache-memory-bytes": f"{cache / GIB:g} GiB of keys and values",
    }
    ours = [text for option, text in said.items() if option in chosen and option not in user_set]
    if model.weight_bytes <= _ONE_THREAD and "OMP_NUM_THREADS" not in environment:
        ours.append("one thread")
    note = ""
    if ours:
        note = f"on a CPU: {', '.join(ours)}; this is fastest; options of vLLM's and OMP_NUM_THREADS override it"
    return chosen, note, needed


def _context(model: ServedModel, options: Sequence[str]) -> int:
    """Tokens of a whole context, with `--max-model-len` heeded."""
    length = option_value(options, "max-model-len")
    if length is None or not length.isdecimal():  # vLLM also takes 8k, and -1 or auto for what fits
        return model.context_length
    if int(length) > model.context_length:
        raise InputError(
            f"--max-model-len {length} is beyond the context of {model.name}, which is {model.context_length} tokens"
        )
    if int(length) < 2:
        raise InputError(f"--max-model-len {length} leaves no room for a prompt and an answer")
    return int(length)


def _refuse(user_set: set[str], model: ServedModel) -> None:
    if "api-key" in user_set:
        raise InputError("a key on a command line can be read by everybody here: set ALMOST_API_KEY instead")
    if "uds" in user_set:
        raise InputError("--uds is not supported: the server is watched over HTTP; give --host and --port")
    if model.checkpoint.adapter and "lora-modules" in user_set:
        raise InputError(f"--model {model.checkpoint.adapter.path} is an adapter already: leave out --lora-modules")
    if doubled := sorted(user_set & _OURS.keys()):
        raise InputError(f"{doubled[0]!r} in the --config file would not act: give {_OURS[doubled[0]]} instead")


def set_options(options: Sequence[str]) -> set[str]:
    """Names of vLLM's options that are set: `no_enable_x` counts as `enable-x`, and a `--config` file is read.

    Raises:
        InputError: the `--config` file cannot be read.
    """
    names = {token[2:].split("=", 1)[0].replace("_", "-") for token in options if token.startswith("--")}
    if file := option_value(options, "config"):
        import yaml

        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"--config {file} cannot be read: {error}") from None
        names |= {str(name).replace("_", "-") for name in content} if isinstance(content, dict) else set()
    both = {name.removeprefix("no-") for name in names}
    return both | {f"no-{name}" for name in both}


def option_value(options: Sequence[str], name: str) -> str | None:
    """The value that `--name VALUE` or `--name=VALUE` has, the last one; None where it is absent."""
    value = None
    for index, token in enumerate(options):
        option, equals, attached = token.partition("=")
        if option.replace("_", "-") == f"--{name}":
            value = attached if equals else (options[index + 1] if index + 1 < len(options) else None)
    return value
