"""Causal language models of transformers: exact log-likelihoods that share prefixes, and generation.

Departures from lm-eval's `hf` model: all requests of a run form one trie and every shared prefix is computed once;
logits are read at scored positions only; a prompt that does not fit is an error, never cut.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack

from almost_eval.engines.base import RequestScores, SamplingParams
from almost_eval.engines.checkpoint_engine import CheckpointEngine
from almost_eval.engines.cuts import cut_trie
from almost_eval.engines.prefix import EncodedRequest, build_trie, scores_of_nothing
from almost_eval.errors import InputError, did_you_mean
from almost_eval.models.checkpoint import Checkpoint
from almost_eval.models.held import HeldOptions
from almost_eval.models.loading import ATTENTION, load_weights, settled_attention, trim_heap, why_not_finite
from almost_eval.types import Completion, EngineReport, JSONObject

if TYPE_CHECKING:
    from almost_eval.engines.hf_header import SharedHeader
    from almost_eval.engines.hf_loglikelihood import AttentionWindow, Limits, SharedPrefixScorer
    from almost_eval.engines.hf_probe import Probe
    from almost_eval.engines.prefix import TokenTrie

_NOT_FINITE = "what the model gives on a probe is not finite"


class HFEngine(CheckpointEngine):
    """A transformers causal LM. Config and tokenizer load at once, weights on first use.

    Args:
        model: a checkpoint directory, hub id, built-in name, or an open `Checkpoint`.
        attention: transformers' attention implementation; `auto` is sdpa where the model has it, and eager
            where it has not, or caps its attention logits, which sdpa would leave out.
        batch_size: sequences in a forward pass, or None for as many as `batch_tokens` allows.
        batch_tokens: token positions in a forward pass, or None for 1,024 on a CPU and 4,096 elsewhere. Halved on
            out-of-memory errors. Memory is bounded by this, one path of keys and values, and the logits of the scored
            positions (at most 256 MiB on a CPU, 1 GiB elsewhere).
        share_prefixes: False computes every continuation on its own (the plain path).
        max_length: a context length below the model's own.
        held: see `HeldOptions`.

    Raises:
        InputError: an unknown dtype or attention, a size below 1, or a `max_length` beyond the model's own.
        ModelError: see `find_checkpoint`; or weights that do not fill the model.
    """

    name = "hf"

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        attention: str = "auto",
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        share_prefixes: bool = True,
        max_length: int | None = None,
        **held: Unpack[HeldOptions],
    ) -> None:
        if attention not in ATTENTION:
            raise InputError(f"unknown attention {attention!r}; {did_you_mean(attention, ATTENTION)}")
        sizes = {"batch size": batch_size, "batch tokens": batch_tokens}
        super().__init__(model, max_length=max_length, sizes=sizes, **held)
        self.share_prefixes = share_prefixes
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.part: int | None = None
        """Number of the part that is computed next, of a run whose parts get the same list of requests: they share its
        trie, and the first alone measures rounding. None: a stream is a whole run, or what is left of one."""
        self.longest = 0
        """Positions of the longest request of the run, where a stream is of some of its requests: what depends on
        lengths (a window, a rotary embedding) is then as it is in the run."""
        self.probes: dict[AttentionWindow, Probe] = {}
        """What the checkpoint can do, by what its layers see; a worker gets what another has found out."""
        self._planned: tuple[Sequence[EncodedRequest], TokenTrie] | None = None
        self._headers: SharedHeader | None = None
        self._attention = settled_attention(attention, self.checkpoint, trust_remote_code=self._trust_remote_code)

    @cached_property
    def model(self) -> Any:
        """The model in eval mode, its weights on the device.

        Raises:
            ModelError: a weight that the model needs is not in the checkpoint.
        """
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        trim_heap()  # of what reading the tokenizer left: the weights are mapped elsewhere, and would come on top
        model = load_weights(
            AutoModelForCausalLM,
            self.checkpoint,
            dtype=getattr(torch, self.dtype),
            device=self.device,
            attention=self._attention,
            trust_remote_code=self._trust_remote_code,
            allow_unused=self._allow_unused_weights,
        )
        # What else a checkpoint's generation_config.json may hold (a repetition penalty, beams) would act unseen:
        # `SamplingParams` is all there is.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        return model

    def settings(self) -> JSONObject:
        """What belongs in a run's spec: runs that differ in any of it may differ in the last bits."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "device": self.device,
            "attention": self._attention,
            "share_prefixes": self.share_prefixes,
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "context_length": self.context_length,
            **self.identity(),
        }

    def stream(
        self, requests: Sequence[EncodedRequest], wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, RequestScores]]:
        """Yield (index, scores) of each wanted request as soon as it is known; see `LoglikelihoodEngine.stream`."""
        from almost_eval.engines import hf_loglikelihood as scoring

        self._report = report = EngineReport(warnings=self.notes)
        wanted = frozenset(range(len(requests)) if wanted is None else wanted)
        yield from scores_of_nothing(requests, wanted)
        if not any(request.continuations for request in requests):
            return
        longest = max(self.longest, self._refuse_long(requests))
        model, config = self.model, self.model.config
        window = scoring.AttentionWindow.of(config, longest)
        probe = self._probe(window)
        trie = self._trie(requests)
        report.tokens_plain, report.tokens_in_trie = trie.tokens_plain, len(trie)
        uneven = scoring.length_dependence(config, longest)
        if not probe.padding_is_exact:
            uneven = "left padding changes this model's answers" if probe.is_finite else _NOT_FINITE
        if uneven:
            report.warnings.append(f"only rows of one length share a batch on the plain path: {uneven}")
        reason = scoring.refusal(config, longest)
        if self.share_prefixes and not reason and not probe.sharing_is_exact:
            off = "failed" if probe.shared is None else f"was off by {probe.shared:.2g} nats"
            reason = f"sharing {off} on a probe of this checkpoint" if probe.is_finite else _NOT_FINITE
        if self.share_prefixes and reason:
            report.warnings.append(f"prefixes are not shared: {reason}")
        limits = self._limits()
        scorer: scoring.SharedPrefixScorer | scoring.PlainScorer
        if self.share_prefixes and not reason:
            trie = cut_trie(trie, max_tokens=limits.tokens, max_rows=limits.rows, max_sequences=limits.sequences)
            report.path, report.tokens_computed = "shared-prefix", len(trie)
            scorer = scoring.SharedPrefixScorer(model, window)
            if self.dtype in ("bfloat16", "float16") and not self.part:
                results = self._stream_and_measure(scorer, trie, requests, wanted, limits, padding=not uneven)
            else:
                results = scorer.stream(trie, requests, wanted, limits)
        else:
            report.path, report.tokens_computed = "plain", scoring.plain_tokens(requests)
            scorer = scoring.PlainScorer(model, padding=not uneven)
            results = scorer.stream(requests, wanted, limits)
        is_finite = True
        for index, scores in results:
            is_finite = is_finite and not any(math.isnan(score.logprob) for score in scores)
            yield index, scores
        if not is_finite:
            report.warnings.append(f"log-probabilities are not finite numbers: {why_not_finite(model)}")
        if scorer.limits_used != limits and scorer.limits_used is not None:
            report.warnings.append(f"out of memory: went on with {scorer.limits_used.tokens} tokens in a batch")

    def _trie(self, requests: Sequence[EncodedRequest]) -> TokenTrie:
        if self.part is None:
            return build_trie(requests)
        if self._planned is None or self._planned[0] is not requests:
            self._planned = (requests, build_trie(requests))
        return self._planned[1]

    def _stream_and_measure(
        self,
        scorer: SharedPrefixScorer,
        trie: TokenTrie,
        requests: Sequence[EncodedRequest],
        wanted: frozenset[int],
        limits: Limits,
        *,
        padding: bool,
    ) -> Iterator[tuple[int, RequestScores]]:
        """Yield as `stream` does, and measure rounding on a sample that a resumed run would take too."""
        from almost_eval.engines.hf_rounding import measure_rounding, rounding_sample

        sample = frozenset(rounding_sample(requests, len(trie)))
        shared: dict[int, RequestScores] = {}
        for index, scores in scorer.stream(trie, requests, wanted | sample, limits):
            if index in sample:
                shared[index] = scores
            if index in wanted:
                yield index, scores
        trim_heap()  # float32 comes on top of what the run left
        self._report.rounding = measure_rounding(
            self.model, requests, shared, limits, window=scorer.window, padding=padding
        )

    def _probe(self, window: AttentionWindow) -> Probe:
        from almost_eval.engines.hf_probe import probe

        if window not in self.probes:
            self.probes[window] = probe(self.model, window, min(len(self.tokenizer), self._vocabulary))
        return self.probes[window]

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _limits(self) -> Limits:
        from almost_eval.engines.hf_loglikelihood import Limits

        limits = self.pass_limits(self._vocabulary)
        return Limits(limits["max_tokens"], limits["max_rows"], limits["max_sequences"])

    def pass_limits(self, vocabulary: int | None = None) -> dict[str, Any]:
        """What a forward pass may hold, as `plan_chunks` takes it; without a size of the vocabulary, the config's.

        Loads no weights.
        """
        if vocabulary is None:
            config = self.checkpoint.config
            vocabulary = int({**config, **config.get("text_config", {})}.get("vocab_size") or len(self.tokenizer))
        on_cpu = self.device == "cpu"
        tokens = self.batch_tokens or (1024 if on_cpu else 4096)
        logits = (1 << 28) if on_cpu else (1 << 30)  # bytes of float32 logits in one pass
        return {"max_tokens": tokens, "max_rows": max(8, logits // (4 * vocabulary)), "max_sequences": self.batch_size}

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index, `params.n` completions) of each rendered prompt; see `GenerationEngine.stream_completions`.

        Raises:
            InputError: a prompt that leaves no room for `max_new_tokens`.
            RunError: out of memory with one prompt.
        """
        from almost_eval.engines import hf_generation as generation

        if not prompts:
            return
        ids = self._prompt_ids(prompts, params)
        self._report = EngineReport("generate", warnings=self.notes)
        done = generation.GenerationReport(self.batch_tokens or self._generation_tokens())
        yield from generation.stream_completions(
            self.model,
            self.tokenizer,
            ids,
            params,
            done,
            max_sequences=self.batch_size,
            header=self._header() if self.share_prefixes else None,
        )
        if done.not_shared:
            self._report.warnings.append(f"prefixes are not shared: {done.not_shared}")
        elif done.copied:
            self._report.warnings.append(f"every row holds a copy of what the prompts share: {done.copied}")
        if done.halved:
            self._report.warnings.append(f"out of memory: went on with {done.max_tokens} tokens in a batch")

    def _header(self) -> SharedHeader:
        """What reads headers of prompts, and keeps them from call to call: self-play has many with the same."""
        from almost_eval.engines.hf_header import SharedHeader

        if self._headers is None or self._headers.model is not self.model:
            self._headers = SharedHeader(self.model)
        return self._headers

    def _generation_tokens(self) -> int:
        """Tokens whose keys and values fit 1 GiB, between 4,096 and 65,536: small models get large batches."""
        if self.device != "cpu":
            return 65536
        text = self.model.config.get_text_config()
        all_heads = getattr(text, "num_attention_heads", None)
        if not isinstance(all_heads, int):  # a state-space model, or one whose layers differ
            return 4096
        heads = getattr(text, "num_key_value_heads", None) or all_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // all_heads
        per_token = 2 * text.num_hidden_layers * heads * size * 4  # bytes of float32 keys and values
        return max(4096, min(65536, (1 << 30) // per_token))
