"""Text after one few-shot header, as it was made before against as it is made now. Paired, in turn.

    python benchmarks/generation.py MODEL HEADER_FILE [--prompts 16] [--new-tokens 48] [--rounds 3] [--dtype float32]

HEADER_FILE is a demonstration file, such as the official `HHH_prompt.txt`; its first `--shots` dialogues stand before
every prompt. Both sides run the same engine and weights. The old one reads the header once for every prompt, sorts the
vocabulary for every token and draws noise for all of it. Prints tokens a second, the ratio of each round, whether the
texts are equal (in half precision they may part, as the header is then rounded in another batch), and the peak memory
of each side where the system tells.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessor, TopPLogitsWarper

from almost_eval.engines import hf_generation
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.hf_sampling import GumbelNoise
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
    options = parser.parse_args()

    demonstrations = parse_demonstrations(options.header.read_text(encoding="utf-8"))
    prompts = [
        demonstrations.document(
            (Message("user", f"Question {number}: tell me about {TOPICS[number % len(TOPICS)]}."),),
            demonstrations.conversations[: options.shots],
        )
        for number in range(options.prompts)
    ]
    params = SamplingParams(options.new_tokens, temperature=1.0, top_p=0.9, stop=STOPS, seed=1)
    new = HFEngine(options.model, dtype=options.dtype)
    old = HFEngine(options.model, dtype=options.dtype, share_prefixes=False)
    old.__dict__["model"] = new.model  # one load of the weights
    lengths = [len(ids) for ids in new.encoder.encode_texts(prompts)]
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {options.shots} shots, {new.dtype}")
    new.generate(prompts[:1], SamplingParams(2))
    ratios, peaks = [], {"old": 0.0, "new": 0.0}
    for number in range(options.rounds):
        seconds, texts = {}, {}
        sides = {"old": old, "new": new}
        for name in sorted(sides, reverse=bool(number % 2)):
            forget_peak()
            with sampler(old=name == "old"):
                begin = time.perf_counter()
                texts[name] = sides[name].generate(prompts, params)
                seconds[name] = time.perf_counter() - begin
            peaks[name] = max(peaks[name], peak_gib())
        tokens = {name: sum(len(one.token_ids) for rows in texts[name] for one in rows) for name in texts}
        ratios.append(seconds["old"] / tokens["old"] / (seconds["new"] / tokens["new"]))
        speed = {name: f"{seconds[name]:.1f} s ({tokens[name] / seconds[name]:.1f} tokens/s)" for name in sides}
        rates = ", ".join(f"{name} {told}" for name, told in speed.items())
        print(f"round {number + 1}: {rates}; equal texts: {texts['old'] == texts['new']}", flush=True)
    memory = ", ".join(f"{name} {peak:.2f} GiB" for name, peak in peaks.items())
    print(f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]; peak memory {memory}")


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
