"""Text after one few-shot header: its keys and values computed once, against once for every prompt. Paired, in turn.

    python benchmarks/generation.py MODEL HEADER_FILE [--prompts 16] [--new-tokens 48] [--rounds 3] [--dtype float32]

HEADER_FILE is text whose demonstrations are separated by lines of `-----`, such as the official `HHH_prompt.txt`. Both
sides run the same engine; the plain one does not share prefixes, which is what was computed before. Prints tokens a
second, the ratio of each round, whether the texts are equal, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine

TOPICS = ("bread", "the moon", "a bicycle", "rain", "chess", "bees", "a good night's sleep", "maps")


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

    text = "\n-----".join(options.header.read_text(encoding="utf-8").split("\n-----")[: options.shots + 1])
    prompts = [
        f"{text}\n-----\n\nHuman: Question {number}: tell me about {TOPICS[number % len(TOPICS)]}.\n\nAssistant:"
        for number in range(options.prompts)
    ]
    params = SamplingParams(options.new_tokens, temperature=1.0, top_p=0.9, seed=1)
    shared = HFEngine(options.model, dtype=options.dtype)
    plain = HFEngine(options.model, dtype=options.dtype, share_prefixes=False)
    plain.__dict__["model"] = shared.model  # one load of the weights
    shared.generate(prompts[:1], SamplingParams(2))
    ratios = []
    for number in range(options.rounds):
        seconds, texts = {}, {}
        sides = {"plain": plain, "shared": shared}
        for name in sorted(sides, reverse=bool(number % 2)):
            begin = time.perf_counter()
            texts[name] = sides[name].generate(prompts, params)
            seconds[name] = time.perf_counter() - begin
        tokens = sum(len(completion.token_ids) for rows in texts["shared"] for completion in rows)
        ratios.append(seconds["plain"] / seconds["shared"])
        rates = ", ".join(f"{name} {seconds[name]:.1f} s ({tokens / seconds[name]:.1f} tokens/s)" for name in seconds)
        print(f"round {number + 1}: {rates}; equal texts: {texts['plain'] == texts['shared']}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]; peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
