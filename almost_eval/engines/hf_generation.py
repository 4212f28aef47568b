"""Sampling with transformers' `generate`, one random generator per completion.

transformers draws from the global generator in batch order, so what a prompt gets depends on its neighbours. Here
the filtered logits receive Gumbel noise from a generator of the completion's own and the largest is taken, which is a
draw from the same softmax (Gumbel-max): batching, resuming and reordering change nothing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.decoding import decode, marks
from almost_eval.engines.hf_header import SharedHeader
from almost_eval.engines.hf_loglikelihood import out_of_memory
from almost_eval.engines.hf_sampling import GumbelNoise, NucleusNoise
from almost_eval.errors import RunError
from almost_eval.models.stops import end_ids, first_stop
from almost_eval.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from almost_eval.models.loading import CausalLM


class StopStrings(StoppingCriteria):
    """Ends a row once its completion holds a stop string.

    transformers' own criterion reads the prompt too (a stop string that the prompt begins ends the row), and does not
    say where a row ended.

    Each step decodes the last tokens of a row, as many as a stop string can span, so a completion of n tokens costs
    O(n) decoded tokens and not O(n^2). A tail may decode differently where it begins (half a character, or a space
    that SentencePiece drops), so the whole completion is decoded once the tail holds a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompt_length = prompt_length
        # A token adds a byte or more. Twice as many, and 16 more: for those that add none (a special token, a space
        # that the decoder removes) and for the first of the tail.
        self._tail = 2 * max((len(text.encode()) for text in stop), default=0) + 16
        self.length: dict[int, int] = {}
        """Row -> tokens of its completion, the one that completed a stop string included."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.BoolTensor:
        """(B,) True where the row has ended; input_ids (B, T) with the prompt."""
        running = [row for row in range(len(input_ids)) if row not in self.length]
        start = max(self._prompt_length, input_ids.shape[1] - self._tail)
        for row, tail in zip(running, input_ids[running, start:].tolist(), strict=True):
            if self._stops(tail) and self._stops(input_ids[row, self._prompt_length :].tolist()):
                self.length[row] = input_ids.shape[1] - self._prompt_length
        ended = [row in self.length for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]

    def _stops(self, ids: list[int]) -> bool:
        """Whether the text of these tokens holds a stop string."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return any(stop in text for stop in self._stop)


@dataclass(slots=True)
class GenerationReport:
    """What a call of `stream_completions` had to do."""

    max_tokens: int
    """Tokens a batch may hold now: halved after each out-of-memory error."""
    halved: bool = False
    not_shared: str | None = None
    """Why the header of the prompts was read for every row; None where it was read once, or not to be shared."""


def stream_completions(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    params: SamplingParams,
    report: GenerationReport,
    *,
    max_sequences: int | None = None,
    share_prefixes: bool = True,
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index, `params.n` completions) of each prompt (token ids) when its last is known; longest prompts first.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        prompts: ids of each prompt.
        params: how to sample.
        report: `max_tokens` bounds rows x (prompt + new tokens) in one batch.
        max_sequences: rows in one batch, or None.
        share_prefixes: read what all prompts of a batch begin with once.

    Raises:
        RunError: out of memory with a single row.
    """
    jobs = deque(
        sorted(
            ((p, c) for p in range(len(prompts)) for c in range(params.n)), key=lambda job: (-len(prompts[job[0]]), job)
        )
    )
    done: dict[int, dict[int, Completion]] = {}
    header = None
    if share_prefixes and jobs:
        header = SharedHeader(model, max(len(prompt) for prompt in prompts) + params.max_new_tokens)
    while jobs:
        width = len(prompts[jobs[0][0]]) + params.max_new_tokens
        rows = max(1, min(report.max_tokens // width, max_sequences or len(jobs), len(jobs)))
        batch = [jobs[i] for i in range(rows)]
        try:
            completions = _batch(model, tokenizer, prompts, batch, params, header)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if rows == 1:
                raise RunError(
                    f"out of memory with one prompt of {len(prompts[batch[0][0]])} tokens and {params.max_new_tokens} "
                    "new ones; use a smaller dtype, fewer new tokens or another device"
                ) from error
            report.max_tokens, report.halved = rows * width // 2, True
            continue
        report.not_shared = header.reason if header else None
        for _ in range(rows):
            jobs.popleft()
        for (p, c), completion in zip(batch, completions, strict=True):
            done.setdefault(p, {})[c] = completion
            if len(done[p]) == params.n:
                whole = done.pop(p)
                yield p, [whole[i] for i in range(params.n)]


@torch.inference_mode()
def _batch(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    batch: Sequence[tuple[int, int]],
    params: SamplingParams,
    header: SharedHeader | None,
) -> list[Completion]:
    ends = end_ids(model.generation_config.eos_token_id, tokenizer, params.stop)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    longest = max(len(prompts[p]) for p, _ in batch)
    ids = torch.full((len(batch), longest), pad, dtype=torch.long)  # (B, T), padded on the left
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    for row, (p, _) in enumerate(batch):
        ids[row, longest - len(prompts[p]) :] = torch.from_numpy(prompts[p].astype(np.int64))
        mask[row, longest - len(prompts[p]) :] = 1
    processors = LogitsProcessorList()
    if params.temperature > 0:
        if params.temperature != 1:
            processors.append(TemperatureLogitsWarper(params.temperature))
        generators = [_generator(params.seed, prompts[p], c) for p, c in batch]
        if params.top_p < 1:
            whole = model.dtype == torch.float32
            processors.append(NucleusNoise(params.top_p, generators, full_precision=whole))
        else:
            processors.append(GumbelNoise(generators))
    stops = StopStrings(tokenizer, params.stop, longest)
    cache = header.rows([prompts[p] for p, _ in batch]) if header else None
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        **({} if cache is None else {"past_key_values": cache}),
        max_new_tokens=params.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([stops] if params.stop else []),
    )
    return [
        _completion(tokenizer, ids[longest - 1], ids[longest:][: stops.length.get(row)], ends, params)
        for row, ids in enumerate(output.tolist())
    ]


def _generator(seed: int, prompt: NDArray[np.int32], completion: int) -> np.random.Generator:
    # Keyed by the prompt's content, not its place in the list: a resumed run hands in only what is missing.
    key = int.from_bytes(hashlib.sha256(prompt.astype("<i4").tobytes()).digest()[:8], "little")
    return np.random.default_rng((seed, key, completion))


def _completion(
    tokenizer: PreTrainedTokenizerBase, before: int, ids: list[int], ends: frozenset[int], params: SamplingParams
) -> Completion:
    reason = "length"
    for at, token in enumerate(ids):
        if token in ends:
            ids, reason = ids[:at], "stop"
            break
    if params.alone:
        whole = text = decode(tokenizer, ids)
        for stop in params.stop:
            text = text.partition(stop)[0]
        return Completion(text, tuple(ids), reason if text == whole else "stop")
    text = _decode_after(tokenizer, before, ids)
    cut = first_stop(text, params.stop)
    if cut is not None:
        text, reason = text[:cut], "stop"
    return Completion(text, tuple(ids), reason)


def _decode_after(tokenizer: PreTrainedTokenizerBase, before: int, ids: list[int]) -> str:
    """The text that `ids` add after the token `before`: SentencePiece decoders drop the space a text begins with."""
    text = decode(tokenizer, ids)
    if not marks(tokenizer).keys().isdisjoint(ids):
        return text  # a thought's marks begin it
    lead = str(tokenizer.decode([before], skip_special_tokens=True))
    whole = str(tokenizer.decode([before, *ids], skip_special_tokens=True))
    return (
        whole[len(lead) :] if lead and whole.startswith(lead) and whole[len(lead) :].lstrip() == text.lstrip() else text
    )
