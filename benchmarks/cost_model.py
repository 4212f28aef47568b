"""What `almost-eval plan --measure` predicts, against the same tasks run at once: tokens exactly, seconds within 20 %.

    python benchmarks/cost_model.py --data-root ../shared/data/hub \
        --model runs/models/smollm2-135m-instruct --model runs/models/gemma-3-270m

For each model: HHH (choice), TruthfulQA and MMLU with some samples of each, and answers to the first Vicuna questions.
Prediction and run are paired in one process, the prediction first; each run scores every sample anew. Nothing else
should run on the machine. The tokens that the engine says it computed must be those that the plan counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from almost_eval.data.sources import find_data
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions, generation_engine
from almost_eval.judge.model_system import ModelSystem, Sampling
from almost_eval.judge.questions import find_questions
from almost_eval.progress import Progress
from almost_eval.run.runner import RunRequest
from almost_eval.suite.pilot import Pilot
from almost_eval.suite.plan import SuiteRequest, plan

LIMITS = {"hhh-choice": 20, "truthfulqa": 60, "mmlu": 2}
"""Task -> samples of each category, of all, of each subject."""
QUESTIONS, NEW_TOKENS = 20, 96
BOUND = 0.20


def main() -> int:
    """Print a row for each task and model; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of samples")
    arguments = parser.parse_args()
    print(f"{'model':24} {'work':12} {'tokens':>8} {'computed':>9} {'predicted':>10} {'measured':>9} {'error':>7}")
    missed = False
    for model in arguments.model:
        rows = [*scoring(model, arguments.data_root, arguments.scale), writing(model, arguments.data_root)]
        total: list[Any] = ["all", 0, 0, 0.0, 0.0]
        for row in rows:
            show(model, *row)
            total = ["all", *(a + b for a, b in zip(total[1:], row[1:], strict=True))]
        show(model, *total)
        off = total[3] / total[4] - 1
        missed |= any(row[1] != row[2] for row in rows) or abs(off) > BOUND
    return int(missed)


def scoring(model: str, data_root: str, scale: float) -> list[list[Any]]:
    """Of each task: name, tokens planned, tokens computed, seconds predicted, seconds measured."""
    rows = []
    engine: Any = None
    pilot = Pilot(Progress())
    for name, limit in LIMITS.items():
        limit = max(1, round(limit * scale))
        base = RunRequest(task="", model=model, data_root=data_root, limit=limit)
        with tempfile.TemporaryDirectory() as folder:
            (one,), _ = plan([name], SuiteRequest(base=base))
            run: Any = one.run
            engine = run.model = engine or run.model  # one load for all
            predicted = pilot.seconds(one)
            began = time.perf_counter()
            results, _ = run.execute(Path(folder) / "run")
            measured = time.perf_counter() - began
        rows.append([name, one.read, results["engine"]["tokens_computed"], predicted, measured])
    return rows


def writing(model: str, data_root: str) -> list[Any]:
    """The same of answers; what is compared is what is read, for an answer may end before its last token."""
    questions, _ = find_questions(None, find_data("hub", data_root), limit=None)
    system = ModelSystem(
        model, questions[:QUESTIONS], Sampling(max_new_tokens=NEW_TOKENS), EngineOptions(dtype="float32")
    )
    engine: Any = generation_engine(model, EngineOptions(dtype="float32"))
    tokens = sum(len(ids) for ids in engine.encoder.encode_texts(system.prompts))
    predicted = Pilot(Progress()).answers(engine, system.prompts, NEW_TOKENS)
    began = time.perf_counter()
    engine.generate(system.prompts, SamplingParams(NEW_TOKENS, 1.0, 1.0))
    return [f"{QUESTIONS} answers", tokens, tokens, predicted, time.perf_counter() - began]


def show(model: str, name: str, tokens: int, computed: int, predicted: float, measured: float) -> None:
    """One row."""
    error = predicted / measured - 1
    print(
        f"{Path(model).name:24} {name:12} {tokens:8,} {computed:9,} {predicted:8.1f} s {measured:7.1f} s {error:+7.1%}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
