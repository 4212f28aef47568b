"""Text from transformers' models, one random generator per completion.

transformers draws from the global generator in batch order, so what a prompt gets depends on its neighbours. Here
the filtered logits receive Gumbel noise from a generator of the completion's own and the largest is taken, which is a
draw from the same softmax (Gumbel-max): batching, resuming and reordering change no random number, and in float32 no
text (`SamplingParams.seed` says what half precision changes).

Rows behind one header are continued by a loop of our own (`hf_decoding.py`) where the model's attention allows it, and
by transformers' `generate` elsewhere. Both give the same texts in float32, which tests hold on a dozen architectures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TemperatureLogitsWarper

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.checkpoint_engine import collected
from almost_eval.engines.decoding import decode, marks
from almost_eval.engines.header_groups import HeaderGroup, header_groups
from almost_eval.engines.hf_decoding import Header, continue_rows
from almost_eval.engines.hf_header import LEAST, SharedHeader
from almost_eval.engines.hf_loglikelihood import AttentionWindow, out_of_memory, padded_left
from almost_eval.engines.hf_rows import ForeignAttention, refusal
from almost_eval.engines.hf_sampling import FiniteLogits, GumbelNoise, NucleusNoise, Sampler
from almost_eval.errors import RunError
from almost_eval.models.loading import why_not_finite
from almost_eval.models.stops import end_ids, first_stop
from almost_eval.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from almost_eval.models.loading import CausalLM

Job = tuple[int, int]
"""Index of a prompt, and the number of its completion."""

LOGITS = 1 << 26
"""Bytes of float32 logits after one step of a batch; drawing from them takes a few times as much."""


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
        completions = input_ids[running, self._prompt_length :].tolist()
        for row, ids in zip(running, completions, strict=True):
            if self.end(ids):
                self.length[row] = len(ids)
        ended = [row in self.length for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]

    def end(self, ids: list[int]) -> bool:
        """Whether a completion, which did not hold a stop string before its last token, holds one now."""
        return bool(self._stop) and self._stops(ids[-self._tail :]) and self._stops(ids)

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
    copied: str | None = None
    """Why every row had a copy of the header in transformers' `generate`; None where all rows attend to the one."""


def stream_completions(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    params: SamplingParams,
    report: GenerationReport,
    *,
    max_sequences: int | None = None,
    header: SharedHeader | None = None,
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index, `params.n` completions) of each prompt (token ids) as soon as its last has ended.

    Prompts that begin alike are continued together; of these the longest first. `report.max_tokens` bounds the tokens
    in one batch, those to come included; a header is counted once where there is one copy of it. `header` reads what
    all prompts of a batch begin with once, and may know headers of earlier calls; without it, transformers' `generate`
    does all.

    Raises:
        RunError: out of memory with a single row; logits that are not finite, after which any text would be made up.
    """
    writer = _Writer(model, tokenizer, prompts, params, report, header)
    longest_first = tuple(sorted(range(len(prompts)), key=lambda p: (-len(prompts[p]), p)))
    groups = header_groups(prompts, params.max_new_tokens) if writer.shares else [HeaderGroup(longest_first, 0)]
    for group in groups:
        yield from collected(writer.write(group, max_sequences), dict.fromkeys(group.prompts, params.n))


class _Writer:
    """Completes batches of one call: with one copy of their header, with a copy for each row, or without any."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[NDArray[np.int32]],
        params: SamplingParams,
        report: GenerationReport,
        header: SharedHeader | None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._params = params
        self._report = report
        self._ends = end_ids(model.generation_config.eos_token_id, tokenizer, params.stop)
        longest = max((len(prompt) for prompt in prompts), default=0) + params.max_new_tokens
        self._window = AttentionWindow.of(model.config, longest)
        self._header = header
        self._why_apart = refusal(model)
        if self._header:
            self._header.prepare(longest)
            report.not_shared = self._header.reason

    @property
    def shares(self) -> bool:
        """Whether a header is read once."""
        return self._header is not None and not self._header.reason

    @property
    def _together(self) -> bool:
        """Whether the rows of a batch attend to one copy of their header."""
        return self.shares and not self._why_apart

    def write(self, group: HeaderGroup, max_sequences: int | None) -> Iterator[tuple[Job, Completion]]:
        """Yield all completions of a group as they end, batch by batch."""
        jobs = [(p, c) for p in group.prompts for c in range(self._params.n)]
        while jobs:
            rows = max(1, min(self._rows(group, jobs[0][0]), max_sequences or len(jobs), len(jobs)))
            left = dict.fromkeys(jobs[:rows])
            try:
                for job, completion in self.complete(group, list(left)):
                    del left[job]
                    yield job, completion
            except FloatingPointError:
                raise RunError(
                    f"{self._model.name_or_path or 'the model'} cannot write: the logits after a prompt are not finite "
                    f"numbers; {why_not_finite(self._model)}"
                ) from None
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if rows == 1:
                    raise RunError(
                        f"out of memory with one prompt of {len(self._prompts[jobs[0][0]])} tokens and "
                        f"{self._params.max_new_tokens} new ones; use a smaller dtype, fewer new tokens or another "
                        "device"
                    ) from error
                self._report.max_tokens, self._report.halved = self._tokens(group, jobs[: rows // 2]), True
            jobs = [*left, *jobs[rows:]]

    def _rows(self, group: HeaderGroup, longest: int) -> int:
        """How many rows a batch with this prompt, its longest, may have."""
        width = len(self._prompts[longest]) + self._params.max_new_tokens
        if not self._together:
            return self._report.max_tokens // width
        fitting = (self._report.max_tokens - group.shared) // (width - group.shared)
        return min(fitting, LOGITS // (4 * int(self._model.config.get_text_config().vocab_size)))

    def _tokens(self, group: HeaderGroup, batch: Sequence[Job]) -> int:
        """What a batch counts against `max_tokens`."""
        width = len(self._prompts[batch[0][0]]) + self._params.max_new_tokens
        return len(batch) * (width - group.shared) + group.shared if self._together else len(batch) * width

    @torch.inference_mode()
    def complete(self, group: HeaderGroup, batch: Sequence[Job]) -> Iterator[tuple[Job, Completion]]:
        """Yield the completion of each job as soon as it has ended.

        Not all, where the model turns out not to allow one copy of the header: rows with copies need smaller batches.
        """
        apart = None if self._together else enumerate(self._complete_apart(batch))
        for row, ids in apart or self._complete_together(group, batch):
            yield batch[row], self._completion(batch[row], ids)

    def _completion(self, job: Job, ids: list[int]) -> Completion:
        reason = "length"
        if (end := next((at for at, token in enumerate(ids) if token in self._ends), None)) is not None:
            ids, reason = ids[:end], "stop"
        if self._params.alone:
            whole = text = decode(self._tokenizer, ids)
            for stop in self._params.stop:
                text = text.partition(stop)[0]
            return Completion(text, tuple(ids), reason if text == whole else "stop")
        text = _decode_after(self._tokenizer, int(self._prompts[job[0]][-1]), ids)
        cut = first_stop(text, self._params.stop)
        if cut is not None:
            text, reason = text[:cut], "stop"
        return Completion(text, tuple(ids), reason)

    def _generators(self, batch: Sequence[Job]) -> list[np.random.Generator]:
        # Keyed by the prompt's content, not its place in the list: a resumed run hands in only what is missing.
        digests = (hashlib.sha256(self._prompts[p].astype("<i4").tobytes()).digest()[:8] for p, _ in batch)
        keys = (int.from_bytes(digest, "little") for digest in digests)
        return [np.random.default_rng((self._params.seed, key, c)) for key, (_, c) in zip(keys, batch, strict=True)]

    def _complete_together(self, group: HeaderGroup, batch: Sequence[Job]) -> Iterator[tuple[int, list[int]]]:
        """Yield (row, its new tokens), behind one copy of the header; not all where the model does not allow it."""
        assert self._header is not None
        params, prompts = self._params, [self._prompts[p] for p, _ in batch]
        header = Header((), 0)
        if group.shared >= LEAST:
            layers = self._header.layers(prompts[0][: group.shared])
            if layers is None:
                self._report.not_shared = self._header.reason
                return
            header = Header(layers, group.shared)
        exact = self._model.dtype == torch.float32
        sampler = Sampler(params.temperature, params.top_p, self._generators(batch), full_precision=exact)
        stops = StopStrings(self._tokenizer, params.stop, 0)

        def has_ended(ids: list[int]) -> bool:
            return ids[-1] in self._ends or stops.end(ids)

        try:
            yield from continue_rows(
                self._model, header, prompts, sampler, has_ended, params.max_new_tokens, self._window
            )
        except Exception as error:  # models refuse a cache and masks that are not their own in many ways
            if out_of_memory(error) or isinstance(error, FloatingPointError):
                raise
            why = str(error) if isinstance(error, ForeignAttention) else type(error).__name__
            self._why_apart = f"the model does not attend to it together ({why})"

    def _complete_apart(self, batch: Sequence[Job]) -> list[list[int]]:
        """The new tokens of each row by transformers' `generate`, with a copy of the header for each row."""
        params, model = self._params, self._model
        prompts = [self._prompts[p] for p, _ in batch]
        pad = self._tokenizer.pad_token_id
        pad = next(iter(self._ends), 0) if pad is None else pad
        ids, mask = padded_left(prompts, pad)
        longest = ids.shape[1]
        stops = StopStrings(self._tokenizer, params.stop, longest)
        cache = self._header.rows(prompts) if self._header else None
        if self._header:
            self._report.not_shared = self._header.reason
        if cache is not None:
            self._report.copied = self._why_apart
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
            eos_token_id=sorted(self._ends) or None,
            logits_processor=self._processors(batch),
            stopping_criteria=StoppingCriteriaList([stops] if params.stop else []),
        )
        return [row[longest:][: stops.length.get(number)] for number, row in enumerate(output.tolist())]

    def _processors(self, batch: Sequence[Job]) -> LogitsProcessorList:
        """What makes transformers' argmax a draw."""
        params, processors = self._params, LogitsProcessorList([FiniteLogits()])
        if params.temperature > 0:
            if params.temperature != 1:
                processors.append(TemperatureLogitsWarper(params.temperature))
            if params.top_p < 1:
                exact = self._model.dtype == torch.float32
                processors.append(NucleusNoise(params.top_p, self._generators(batch), full_precision=exact))
            else:
                processors.append(GumbelNoise(self._generators(batch)))
        return processors


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
