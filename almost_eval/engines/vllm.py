"""Causal language models on vLLM, in this process: generation, and log-likelihoods that use the prefix cache.

Results are reproducible up to rounding: every completion has a seed of its own, but which requests share a step depends
on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from almost_eval.engines.base import RequestScores, SamplingParams
from almost_eval.engines.checkpoint_engine import CheckpointEngine, collected
from almost_eval.engines.decoding import decode, marks
from almost_eval.engines.prefix import EncodedRequest, scores_of_nothing
from almost_eval.engines.seeding import request_seed
from almost_eval.engines.vllm_loglikelihood import stream_scores
from almost_eval.engines.vllm_process import (
    LLM,
    HoldsLLM,
    Output,
    Params,
    Requests,
    VLLMOptions,
    load,
    refuse_data_parallel,
    run,
    with_adapter,
)
from almost_eval.engines.vllm_speculative import read_speculative
from almost_eval.errors import InputError
from almost_eval.models.adapters import refuse_for_vllm
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint, refuse_stray_weights
from almost_eval.models.loading import Purpose, first_line
from almost_eval.models.stops import end_ids, first_stop
from almost_eval.types import Completion, EngineReport, JSONObject


class VLLMEngine(HoldsLLM, CheckpointEngine):
    """A causal language model on vLLM. Config and tokenizer load at once, weights on first use.

    vLLM sets the global random seeds of this process when it loads; nothing here draws from them.

    Args:
        model: a checkpoint directory, hub id, built-in name, or an open `Checkpoint`.
        dtype: `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        max_length: a context length below the model's own.
        data_parallel_size: must be 1: vLLM replicates a model behind its server alone.
        speculative_config: how later tokens are guessed, for `generate` alone; see `vllm_speculative`.
        allow_pickle: accept pickled weights.
        trust_remote_code: run Python code that the checkpoint ships.
        purpose: `generate` where it will only continue prompts; `auto` may then be bfloat16 on a CPU (`pick_dtype`).

    All others: see `VLLMOptions`.

    Raises:
        InputError: an unknown dtype, a size below 1, or a `max_length` beyond the model's own.
        ModelError: see `find_checkpoint`; raised on first use where vLLM cannot run the model.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        quantization: str | None = None,
        speculative_config: str | Mapping[str, Any] | None = None,
        gpu_memory: float | None = None,
        kv_cache_gib: float | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        purpose: Purpose = "score",
        allow_unused_weights: bool = False,
    ) -> None:
        refuse_data_parallel(data_parallel_size)
        parallel = (tensor_parallel_size, pipeline_parallel_size)
        self.options = VLLMOptions(batch_size, batch_tokens, *parallel, gpu_memory, kv_cache_gib, quantization)
        if not isinstance(model, Checkpoint):
            model = find_checkpoint(model, allow_pickle=allow_pickle)
        refuse_stray_weights(model)
        self.options.check_split(model)
        if speculative_config and pipeline_parallel_size > 1:
            raise InputError(  # 0.31: the first process looks for the guesses, and the last one has them
                "vLLM guesses no tokens where the layers are divided: leave out speculative_config, or divide by "
                "tensor_parallel_size"
            )
        self.speculative = read_speculative(speculative_config, model) if speculative_config else None
        if model.adapter:
            refuse_for_vllm(model.adapter)
        super().__init__(
            model,
            dtype=dtype,
            max_length=max_length,
            sizes={},
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            purpose=purpose,
            allow_unused_weights=allow_unused_weights,
        )

    def settings(self) -> JSONObject:
        """What belongs in a run's spec; see `HFEngine.settings`."""
        guesses = {"speculative_config": self.speculative.settings()} if self.speculative else {}
        return {**self.options.settings(self.dtype, self.context_length), **guesses, **self.identity()}

    # --- the model ---

    @cached_property
    def llm(self) -> LLM:
        """The `vllm.LLM`, loaded.

        Raises:
            ModelError: vLLM cannot run this model here.
        """
        # One more than the context: vLLM wants room for a new token even where a full context is only scored.
        longest = self.context_length + 1
        options = self.options.for_loading(self.dtype, longest, trust_remote_code=self._trust_remote_code)
        if self.speculative:
            options["speculative_config"] = dict(self.speculative.config)
        return self._hold(load(self.checkpoint.path, with_adapter(options, self.checkpoint.adapter)))

    def results(self, requests: Requests) -> Iterator[tuple[str, Output]]:
        """Yield (name, vLLM's output) of each request (token ids, vLLM's sampling parameters) as it finishes."""
        return run(self.llm, requests, self.checkpoint.path, self.checkpoint.adapter)

    # --- log-likelihoods ---

    def stream(
        self, requests: Sequence[EncodedRequest], wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, RequestScores]]:
        """Yield (index, scores) of each wanted request as soon as it is known.

        Unlike `HFEngine`, vLLM forms its batches from what is wanted: a resumed run is equal up to rounding.

        Raises:
            InputError: a request longer than the context; nothing is cut.
            ModelError: vLLM cannot run the model.
        """
        self._report = report = EngineReport("vllm", warnings=self.notes)
        wanted = range(len(requests)) if wanted is None else wanted
        yield from scores_of_nothing(requests, wanted)
        if not any(request.continuations for request in requests):
            return
        self._refuse_long(requests)
        yield from stream_scores(self.results, requests, wanted, report)

    # --- generation ---

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index, `params.n` completions) of each rendered prompt; see `GenerationEngine.stream_completions`.

        Raises:
            InputError: a prompt that leaves no room for `max_new_tokens`; values that vLLM does not sample with.
            ModelError: vLLM cannot run the model.
        """
        if not prompts:
            return
        ids = self._prompt_ids(prompts, params)
        self._report = EngineReport("generate", warnings=self.notes)
        ends = self._end_ids(params.stop)
        draws = params.n if params.temperature > 0 else 1  # greedy completions are all the same
        requests = {
            f"{p}/{c}": (ids[p], self._sampling(prompt, c, params, ends))
            for p, prompt in enumerate(prompts)
            for c in range(draws)
        }
        completions = self._completions(requests, params, ends)
        for p, drawn in collected(completions, dict.fromkeys(range(len(prompts)), draws)):
            yield p, [drawn[i % draws] for i in range(params.n)]

    def _completions(
        self, requests: Requests, params: SamplingParams, ends: Collection[int]
    ) -> Iterator[tuple[tuple[int, int], Completion]]:
        """((prompt, number of its completion), completion) as they end; a request is named by both numbers."""
        thought = marks(self.tokenizer)
        for name, output in self.results(requests):
            p, c = map(int, name.split("/"))
            one = output.outputs[0]
            ids, text = tuple(one.token_ids), one.text
            if ids and ids[-1] in ends:
                ids = ids[:-1]
            if not thought.keys().isdisjoint(ids):  # vLLM skips them, as it does all special tokens
                text = decode(self.tokenizer, ids)
                text = text[: first_stop(text, params.stop)]
            yield (p, c), Completion(text, ids, "stop" if one.finish_reason == "stop" else "length")

    def _sampling(self, prompt: str, number: int, params: SamplingParams, ends: Collection[int]) -> Params:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        try:
            return vllm.SamplingParams(
                max_tokens=params.max_new_tokens,
                temperature=params.temperature,
                top_p=params.top_p if params.temperature > 0 else 1.0,
                seed=request_seed(params.seed, prompt, number),
                stop=list(params.stop),
                stop_token_ids=sorted(ends),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except Exception as error:  # vLLM's own, of no common base; 0.31 takes no temperature above 2
            raise InputError(
                f"vLLM cannot sample so: {first_line(error)}; use the engine hf, or other values"
            ) from None

    def _end_ids(self, stop: Sequence[str]) -> frozenset[int]:
        """Tokens that end a completion, as for `HFEngine`."""
        own = self.checkpoint.config.get("eos_token_id")
        file = self.checkpoint.path / "generation_config.json"
        if file.is_file():
            own = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", own)
        return end_ids(own, self.tokenizer, stop)
