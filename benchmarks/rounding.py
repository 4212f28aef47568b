"""How far half precision is from float32, on the shared path and request by request, on the same questions.

    python benchmarks/rounding.py --data-root ../shared/data/hub --model runs/models/smollm2-135m-instruct --requests 40

Prints, for each task: the median and the largest |difference| from float32 in nats for both paths, their ratio, and how
many requests change their most likely continuation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("hhh", "truthfulqa", "mmlu")


def main() -> None:
    """Measure each task with each dtype on each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, help="May be repeated.")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float16"], help="bfloat16; may be repeated.")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--requests", type=int, default=40, help="Compared, drawn from all of a task's.")
    options = parser.parse_args()
    for model in options.model:
        for dtype in options.dtype or ["bfloat16"]:
            for task in options.tasks.split(","):
                measured = measure(task, model, dtype, options.data_root, options.requests)
                ratio = measured["shared"]["median"] / max(measured["plain"]["median"], 1e-12)
                print(json.dumps({"model": Path(model).name, "dtype": dtype, "task": task, "ratio": ratio} | measured))


def measure(task: str, model: str, dtype: str, data_root: Path, n: int) -> dict[str, Any]:
    """One row: the requests are drawn with a seed of their own, the trie is of these requests."""
    from almost_eval.data.sources import DataSource
    from almost_eval.engines.hf import HFEngine
    from almost_eval.engines.hf_loglikelihood import AttentionWindow, SharedPrefixScorer
    from almost_eval.engines.hf_rounding import measure_rounding
    from almost_eval.engines.prefix import build_trie
    from almost_eval.run.runner import Run
    from almost_eval.tasks.base import Task, resolve_prompting
    from almost_eval.tasks.hhh import HHH
    from almost_eval.tasks.mmlu import MMLU
    from almost_eval.tasks.truthfulqa import TruthfulQA

    engine = HFEngine(model, dtype=dtype)
    data = DataSource("hub", data_root)
    prompting = resolve_prompting(data, None, "auto", engine.tokenizer, own_prompts=task != "hhh")
    made: Task
    if task == "hhh":
        made = HHH("choice", data, prompting)
    elif task == "mmlu":
        made = MMLU(("anatomy", "college_physics"), 5, data, prompting)
    else:
        made = TruthfulQA(["mc1", "mc2"], data, prompting)
    prepared = Run(made, engine).prepared
    assert prepared is not None
    drawn = np.random.default_rng(0).permutation(len(prepared.requests))[:n]
    requests = [prepared.requests[i] for i in sorted(drawn.tolist())]
    window = AttentionWindow.of(engine.model.config, max(request.n_positions for request in requests))
    everything = range(len(requests))
    scorer = SharedPrefixScorer(engine.model, window)
    shared = dict(scorer.stream(build_trie(requests), requests, everything, engine._limits()))
    return measure_rounding(engine.model, requests, shared, engine._limits(), window=window, padding=True)


if __name__ == "__main__":
    main()
