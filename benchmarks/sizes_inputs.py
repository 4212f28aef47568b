"""The inputs of `sizes.py`, made from a fixed seed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = ("large-5", "large-1", "small-5", "small-1")
WORDS = "the a of to and is in it you that plants water slowly because often heat light garden never bread".split()


def make_prompts(folder: Path, count: int) -> None:
    """`count` prompts."""
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as stream:
        for i in range(count):
            stream.write(json.dumps({"id": f"p{i:05d}", "prompt": f"What should I know about number {i}?"}) + "\n")


def make_answers(folder: Path, count: int) -> None:
    """Answers of four configurations to `count` prompts, judged by the official rules; the ranking beside them."""
    from almost_train.synthetic.filters import broken_rule

    rng = random.Random(0)
    (folder / "responses").mkdir(parents=True)
    for place, name in enumerate(CONFIGURATIONS):
        with (folder / "responses" / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for i in range(count):
                text = " ".join(rng.choices(WORDS, k=rng.randint(5, 80 - 10 * place))) + rng.choice(".....!?")
                row: dict[str, str | None] = {
                    "id": f"p{i:05d}",
                    "prompt": f"What should I know about number {i}?",
                    "response": text,
                }
                row |= {"finish_reason": "stop", "configuration": name, "rejected": broken_rule(text, 50)}
                stream.write(json.dumps(row) + "\n")
    (folder / "ranking.yaml").write_text(json.dumps(CONFIGURATIONS), encoding="utf-8")


def make_run(folder: Path, count: int) -> None:
    """Two finished runs of `count` samples: a small real run's again and again, each with its own id and numbers.

    Each has 60 words of its own, too, so that a sample takes as much room in a page as a question of MMLU.
    """
    from almost_eval.data.sources import DataSource
    from almost_eval.files import read_rows, write_json, write_rows
    from almost_eval.run.runner import summarise
    from almost_eval.run.store import read_results, read_samples, read_spec
    from almost_eval.run.validity import check
    from almost_eval.tasks.registry import build_task

    small = folder / "small"
    command = [sys.executable, "-m", "almost_eval.cli.main", "hhh", "--limit", "200", "--output", str(small)]
    subprocess.run(command, cwd=ROOT, check=False, capture_output=True)  # 3: the small model's ties block its headline
    lines = read_rows(small / "samples.jsonl")
    asked = read_rows(small / "prompts.jsonl")
    pieces, prompts = [row for row in asked if "piece" in row], {row["id"]: row for row in asked if "id" in row}

    def samples(seed: int) -> Iterator[Any]:
        rng = random.Random(seed)
        for i in range(count):
            line = json.loads(json.dumps(lines[i % len(lines)]))
            line["id"] += f"-{i:06d}"
            line["sample"]["cluster"] += f" ({i:06d})"
            likely = line["outputs"]["loglikelihoods"]
            line["outputs"]["loglikelihoods"] = [[value - rng.random() / 8 for value in row] for row in likely]
            yield line

    def texts() -> Iterator[Any]:
        yield from pieces
        rng = random.Random("words")
        words = ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(3, 9))) for _ in range(4_000)]
        for i in range(count):
            row = json.loads(json.dumps(prompts[lines[i % len(lines)]["id"]]))
            row["id"] += f"-{i:06d}"
            case = f"(case {i}) {' '.join(rng.choices(words, k=60))}. "
            for prompt in row["prompts"]:
                prompt["text"] = case + prompt["text"]
            yield row

    spec, results = read_spec(small), read_results(small)
    spec["n_samples"] = count
    spec["settings"].pop("limit", None)
    for seed, name in enumerate(("run", "other")):
        target = folder / name
        write_rows(target / "samples.jsonl", samples(seed))
        write_rows(target / "prompts.jsonl", texts())
        spec |= {"weight_digest": f"digest of {name}", "model_name": f"nano/{name}"}
        write_json(target / "spec.json", spec)
        task = build_task(spec["task"], spec["protocol"], spec["settings"], DataSource("nano", None))
        records = list(read_samples(target))
        # What the changed numbers say, and what is stored, are to agree.
        from dataclasses import replace

        from almost_eval.run.interview import score_texts
        from almost_eval.run.store import record_to_dict

        records = [replace(one, score=score_texts(task, one.sample, one.outputs)) for one in records]
        write_rows(target / "samples.jsonl", map(record_to_dict, records))
        allowed = {name: entry["allowed"] for name, entry in results["validity"]["checks"].items()}
        again = summarise(task, records, check(records, count, allowed), spec, results["engine"])
        write_json(target / "results.json", results | again)
    shutil.rmtree(small)


def make_journal(folder: Path, count: int) -> None:
    """A journal of `count` replies, written in large transactions."""
    from almost_eval.judge.api.journal import BILLED, Journal, enter, reply_text, request_text, settle

    with Journal(folder / "journal.sqlite") as journal:
        for first in range(0, count, 10_000):
            with journal.writing() as database:
                for i in range(first, min(count, first + 10_000)):
                    request, reply = review(i)
                    row = (request.digest, request_text(request), reply_text(reply), 2e9 + i)  # after its sending
                    database.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", row)
                    settle(database, enter(database, request.digest, BILLED, reply.usage), BILLED, reply.usage)


def review(i: int) -> tuple[Any, Any]:
    """A request of the size of a short review, and its reply."""
    from almost_eval.judge.records import JudgeRequest, Reply
    from almost_eval.types import Message

    text = f"[Question] {i}\n" + " ".join(str(i * k % 9973) for k in range(1, 301))
    request = JudgeRequest("judge", (Message("user", text),), temperature=0.0, max_tokens=512)
    return request, Reply(f"{i % 10} {i % 7}\n" + text[:900], "stop", "judge-1", 800, 200)


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "responses": make_prompts,
    "comparisons": make_answers,
    "report": make_run,
    "journal": make_journal,
}
