"""The last step of vLLM's sampler, its own against ours, on rows as a model in bfloat16 gives them: CPU time of a row.

`python benchmarks/vllm_sampler.py` takes a minute, on one thread; `--vocabulary 262144 --rows 8` is as Gemma has it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # else `serving` is the script beside this one

from almost_eval.engines.vllm_sampling import ExactSampler
from benchmarks.serving import in_turn, show

CASES = {
    "plain": (None, False),
    "seed": (None, True),
    "top-p 0.9": (0.9, False),
    "top-p 0.9, seed": (0.9, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rows", type=int, default=16, help="of one step")
    parser.add_argument("--rounds", type=int, default=15, help="of each sampler, in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

    vllms = TopKTopPSampler()
    ours = ExactSampler(vllms, apply_top_k_top_p)
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(options.rows, options.vocabulary, generator=rng) * 3).bfloat16().float()
    table = []
    for name, (top_p, seeded) in CASES.items():
        p = None if top_p is None else torch.full((options.rows,), top_p)

        def side(sampler: Any, p: torch.Tensor | None = p, seeded: bool = seeded) -> tuple[float, list[int]]:
            generators = {row: torch.Generator().manual_seed(row) for row in range(options.rows)} if seeded else {}
            mine = logits.clone()  # vLLM's writes into it
            began = time.process_time()
            tokens = sampler(mine, generators, None, p)[0].tolist()
            return 1e6 * (time.process_time() - began) / options.rows, tokens

        for sampler in (vllms, ours):
            side(sampler)  # may compile
        theirs, mine = in_turn(options.rounds, lambda: side(vllms), lambda: side(ours))
        cost = [statistics.median(one for one, _ in rounds) for rounds in (theirs, mine)]
        same = all(a == b for (_, a), (_, b) in zip(theirs, mine, strict=True)) if seeded else "other draws"
        table.append(
            {
                "": name,
                "vLLM's, us a row": round(cost[0]),
                "ours": round(cost[1]),
                "ratio": round(cost[0] / cost[1], 1),
                "same tokens": same,
            }
        )
    show(f"{options.rows} rows of {options.vocabulary:,} tokens", table)


if __name__ == "__main__":
    main()
