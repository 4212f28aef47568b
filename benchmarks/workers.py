"""What workers cost to start, and what they save: one run of a built-in model alone and on 1, 2 and 4 workers.

Usage: python benchmarks/workers.py [--model nano/almost] [--task mmlu] [--limit 8] [--repeats 3] [--workers 0 1 2 4]

Each run is a process of its own, in turn (0, 1, 2, 4, then again), and the best of the repeats counts. It prints
seconds to the first sample, seconds in all, and whether the scores are those of the run without workers in every bit;
every run has one thread, as the number of threads reaches the last bits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(folder: Path, model: str, task: str, limit: int | None, workers: int) -> tuple[float, float, list[str]]:
    """Seconds to the first sample, seconds in all, and the sorted lines of samples.jsonl."""
    command = [sys.executable, "-m", "almost_eval.cli", task, "--model", model, "--device", "cpu", "--json"]
    command += ["--output", str(folder), *(["--limit", str(limit)] if limit else [])]
    command += ["--workers", str(workers)] if workers else []
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    timing = json.loads(done.stdout)["timing"]
    lines = sorted((folder / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return timing["seconds_to_first_sample"], timing["seconds"], lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano/almost")
    parser.add_argument("--task", default="mmlu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    arguments = parser.parse_args()
    results: dict[int, list[tuple[float, float, list[str]]]] = {workers: [] for workers in arguments.workers}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for workers in arguments.workers:
                place = Path(folder) / f"{workers}-{repeat}"
                results[workers].append(run(place, arguments.model, arguments.task, arguments.limit, workers))
    truth = results[arguments.workers[0]][0][2]
    print(f"{arguments.task} on {arguments.model}: {len(truth)} samples, best of {arguments.repeats}")
    print("workers  first sample, s  all, s  same bits")
    for workers, runs in results.items():
        same = all(lines == truth for _, _, lines in runs)
        print(
            f"{workers:7}  {min(r[0] for r in runs):15.2f}  {min(r[1] for r in runs):6.2f}  {'yes' if same else 'NO'}"
        )


if __name__ == "__main__":
    main()
