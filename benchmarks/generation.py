"""Text after one few-shot header, as it was made before against as it is made now. Paired, in turn.

    python benchmarks/generation.py MODEL HEADER_FILE [--prompts 16] [--new-tokens 48] [--rounds 3] [--dtype float32]

HEADER_FILE is a demonstration file, such as the official `HHH_prompt.txt`; its first `--shots` dialogues stand before
every prompt. Both sides run the same weights. The old one is transformers' `generate` on a padded batch: it reads the
header once for every prompt, copies all keys at every step, sorts the vocabulary for every token and draws noise for
all of it. Prints tokens a second of time and of CPU time, the ratio of each round, whether the texts are equal (in half
precision they may part, as other batches round in other ways), and the peak memory of each side where the system tells.
Beside other jobs only the ratio of CPU times says something. Headers that an engine has kept are forgotten before each
round.

`--profile` prints where the new side spends its CPU time instead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, TopPLogitsWarper

from almost_eval.engines import hf_decoding, hf_generation, hf_header, hf_rows
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.hf_sampling import GumbelNoise, Sampler
from almost_eval.types import Message
from almost_train.synthetic.prompt_sets import parse_demonstrations
from almost_train.synthetic.responses import STOPS

TOPICS = ("bread", "the moon", "a bicycle", "rain", "chess", "bees", "a good night's sleep", "maps")


class SortedNoise(LogitsProcessor):
    """What `NucleusNoise` stands for now."""

    def __init__(self, top_p: float, generators: Sequence[np.random.Generator], *, full_precision: bool) -> None:
        self._top_p, self._noise = TopPLogitsWarper(top_p), GumbelNoise(generators)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(B, V), all of it sorted."""
        return self._noise(input_ids, self._top_p(input_ids, scores))


@contextmanager
def sampler(*, old: bool) -> Iterator[None]:
    """Inside, generation samples as it did before, or as it does."""
    present = hf_generation.NucleusNoise
    if old:
        hf_generation.NucleusNoise = SortedNoise  # type: ignore[assignment,misc]
    yield
    hf_generation.NucleusNoise = present  # type: ignore[misc]


def main() -> None:
    """Run both sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("header", type=Path)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    demonstrations = parse_demonstrations(options.header.read_text(encoding="utf-8"))
    prompts = [
        demonstrations.document(
            (Message("user", f"Question {number}: tell me about {TOPICS[number % len(TOPICS)]}."),),
            demonstrations.conversations[: options.shots],
        )
        for number in range(options.prompts)
    ]
    params = SamplingParams(options.new_tokens, temperature=1.0, top_p=options.top_p, stop=STOPS, seed=1)
    new = HFEngine(options.model, dtype=options.dtype)
    old = HFEngine(options.model, dtype=options.dtype, share_prefixes=False)
    old.__dict__["model"] = new.model  # one load of the weights
    lengths = [len(ids) for ids in new.encoder.encode_texts(prompts)]
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {options.shots} shots, {new.dtype}")
    new.generate(prompts[:1], SamplingParams(2))
    if options.profile:
        new._headers = None  # the call before has read it
        with clocks() as costs:
            begin = time.process_time()
            new.generate(prompts, params)
            whole = time.process_time() - begin
        for name, seconds in costs.items():
            print(f"{name}: {seconds:.2f} s, {seconds / whole:.0%}")
        print(f"all: {whole:.2f} s")
        return
    compare({"old": old, "new": new}, prompts, params, options.rounds)


def compare(sides: Mapping[str, HFEngine], prompts: Sequence[str], params: SamplingParams, rounds: int) -> None:
    """Run both sides in turn, the other one first in every second round, and print each round and the ratios."""
    clock, cpu = [], []
    peaks = dict.fromkeys(sides, 0.0)
    for number in range(rounds):
        spent: dict[str, tuple[float, float]] = {}  # seconds and seconds of CPU for a new token
        texts = {}
        for name in sorted(sides, reverse=bool(number % 2)):
            forget_peak()
            sides[name]._headers = None  # an engine keeps the headers of earlier calls
            with sampler(old=name == "old"):
                begin = time.perf_counter(), time.process_time()
                texts[name] = sides[name].generate(prompts, params)
                end = time.perf_counter(), time.process_time()
            tokens = sum(len(one.token_ids) for rows in texts[name] for one in rows)
            spent[name] = (end[0] - begin[0]) / tokens, (end[1] - begin[1]) / tokens
            peaks[name] = max(peaks[name], peak_gib())
        clock.append(spent["old"][0] / spent["new"][0])
        cpu.append(spent["old"][1] / spent["new"][1])
        rates = ", ".join(f"{name} {1 / a:.2f} tokens/s, {1 / b:.2f} of CPU" for name, (a, b) in spent.items())
        print(f"round {number + 1}: {rates}; equal texts: {texts['old'] == texts['new']}", flush=True)
    memory = ", ".join(f"{name} {peak:.2f} GiB" for name, peak in peaks.items())
    for what, ratios in (("time", clock), ("CPU time", cpu)):
        print(f"ratio of {what}: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    print(f"peak memory {memory}")


PARTS: dict[str, tuple[Any, str]] = {
    "reading the header": (hf_header.SharedHeader, "_read"),
    "reading what follows it in each prompt": (hf_decoding, "_read"),
    "steps and reading: the model": (hf_decoding.Rows, "forward"),
    "of this, attention": (hf_rows, "_attend"),
    "drawing tokens": (Sampler, "draw"),
    "rows that leave": (hf_decoding.Rows, "keep"),
    "stop strings": (hf_generation.StopStrings, "end"),
}
"""What `--profile` tells apart, and the function that does it."""


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds of CPU in each part, as far as they are known when it is left."""
    costs = dict.fromkeys(PARTS, 0.0)
    with ExitStack() as patches:
        for part, (owner, name) in PARTS.items():
            whole = getattr(owner, name)

            def timed(*args: Any, _whole: Any = whole, _part: str = part, **kwargs: Any) -> Any:
                begin = time.process_time()
                result = _whole(*args, **kwargs)
                costs[_part] += time.process_time() - begin
                return result

            setattr(owner, name, timed)
            patches.callback(setattr, owner, name, whole)
        yield costs


def forget_peak() -> None:
    """Let the peak of this process be counted anew; nothing where the system is not Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_gib() -> float:
    """Peak memory since `forget_peak`; NaN where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20


if __name__ == "__main__":
    main()
