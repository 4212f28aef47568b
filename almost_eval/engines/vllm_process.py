"""vLLM models in this process: what they are loaded with, how several live side by side, how memory comes back.

vLLM's engine core runs in our process, not in a child: it then cannot outlive us, however we end; its scheduling does
not depend on a race between two processes; and a second model starts in seconds. Devices beyond the first (tensor or
pipeline parallelism) are run by workers that watch a pipe of ours and end with it.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from almost_eval.engines.hf import _first_line, pick_device
from almost_eval.engines.prefix import Ids
from almost_eval.errors import InputError, ModelError, RunError

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # an error is raised and told in one line; vLLM logs every request of the step
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # `VLLMEngine.llm` asks for one position more than the context
}
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # `auto` leaves a core idle, and two engines share them
"""What vLLM reads from the environment; whatever is set there already stays."""

_loaded: list[Any] = []
"""The `vllm.LLM`s of this process that hold memory."""


def load(path: Path, options: Mapping[str, Any]) -> Any:
    """A `vllm.LLM` of the checkpoint at `path`; options that are None are vLLM's to choose.

    Raises:
        InputError: this process takes part in distributed training.
        ModelError: vLLM cannot run this model here.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # that there is no Triton is no news on a CPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm import LLM
        from vllm.platforms import current_platform

    if torch.distributed.is_available() and torch.distributed.is_initialized() and not _loaded:
        raise InputError(
            "this process belongs to a group of torch.distributed, which vLLM would take over: serve the model in "
            "another process, and use the engine openai with its address"
        )
    chosen = {"enable_prefix_caching": True, **options, **(_cpu_options(options) if current_platform.is_cpu() else {})}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            llm = LLM(
                str(path),
                generation_config="vllm",  # the checkpoint's own sampling settings would act unseen
                use_tqdm_on_load=False,
                **{name: value for name, value in chosen.items() if value is not None},
            )
    except Exception as error:  # vLLM raises whatever its parts do
        raise ModelError(f"vLLM cannot run {path}: {_first_line(error)}") from None
    _loaded.append(llm)
    return llm


def run(llm: Any, requests: Mapping[str, tuple[Ids, Any]], path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, vLLM's output) of each request (token ids, vLLM's parameters) as it finishes.

    Raises:
        RunError: vLLM fails, or is in the middle of another stream.
    """
    core = llm.llm_engine
    if core.has_unfinished_requests():
        raise RunError("this vLLM engine is in the middle of another stream; finish or close that one first")
    running = set()
    try:
        inputs = llm.renderer.render_cmpl([{"prompt_token_ids": ids.tolist()} for ids, _ in requests.values()])
        for (name, (_, params)), prompt in zip(requests.items(), inputs, strict=True):
            core.add_request(name, prompt, params)
            running.add(name)
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    running.discard(output.request_id)
                    yield output.request_id, output
    except (RuntimeError, ValueError, AssertionError) as error:  # of a kernel, the scheduler, a full memory
        raise RunError(f"vLLM stopped while it ran {path}: {_first_line(error)}") from None
    finally:
        if running:  # an error, or nobody wants the rest
            core.abort_request(sorted(running))


def version() -> str | None:
    """The version of vLLM; the distribution that brings it has one of two names. None where neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def device() -> str:
    """Where vLLM runs: it takes the accelerator where there is one."""
    return pick_device("auto")


def release(llm: Any) -> None:
    """Give a model's memory back."""
    _loaded.remove(llm)
    client = llm.llm_engine.engine_core
    if not _loaded:
        client.shutdown()
    else:  # its own shutdown tears down the process groups that the other models of this process run on
        client._finalizer.detach()
        client.engine_core.model_executor.shutdown()
    gc.collect()


def _cpu_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    chosen: dict[str, Any] = {
        "enforce_eager": True,  # 2.5-3x faster on small models, and ready sooner
        "block_size": 32,  # prefixes are reused in whole blocks; the default on a CPU is 128
        # No prompt may be read in parts: vLLM samples after each part, throws the token away and sets the request's
        # generator back, which torch's CPU generators cannot (0.31: "CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(options["max_num_batched_tokens"] or 4096, options["max_model_len"]),
    }
    if options["kv_cache_memory_bytes"] is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        chosen["kv_cache_memory_bytes"] = 1 << 30
    return chosen
