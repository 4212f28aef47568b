"""What grows with a run: memory, time and their growth at a hundred thousand and a million.

    python benchmarks/sizes.py comparisons --prompts 1000000   (four configurations; 8 GB of scratch files)
    python benchmarks/sizes.py overlap --prompts 100000        (the ROUGE-L filter of prompt mining)
    python benchmarks/sizes.py report --samples 200000         (a page in a real chromium; verify, compare)
    python benchmarks/sizes.py journal --reviews 1000000       (a judge's replies; 4 GB of scratch files)

Inputs are made on the fly from a fixed seed, in --scratch (a temporary folder if left out), and removed at the end.
Each figure comes from a process of its own, that has made none of the inputs: peak memory (RSS) in MiB, user CPU
seconds, and how both grew from a smaller size to the next. The exit code is 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "almost_train" / "synthetic")]

GIBIBYTE = 1024.0  # MiB
OPENS_WITHIN = 3.0  # seconds
CONFIGURATIONS = ("large-5", "large-1", "small-5", "small-1")

Figures = dict[str, Any]


# --- comparisons ---


def make_answers(folder: Path, count: int) -> None:
    """Answers of four configurations to `count` prompts, judged by the official rules; the ranking beside them."""
    from almost_train.synthetic.filters import broken_rule

    rng = random.Random(0)
    words = "the a of to and is in it you that plants water slowly because often heat light garden never bread".split()
    (folder / "responses").mkdir(parents=True)
    for place, name in enumerate(CONFIGURATIONS):
        with (folder / "responses" / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for i in range(count):
                text = " ".join(rng.choices(words, k=rng.randint(5, 80 - 10 * place))) + rng.choice(".....!?")
                row: dict[str, str | None] = {
                    "id": f"p{i:05d}",
                    "prompt": f"What should I know about number {i}?",
                    "response": text,
                }
                row |= {"finish_reason": "stop", "configuration": name, "rejected": broken_rule(text, 50)}
                stream.write(json.dumps(row) + "\n")
    (folder / "ranking.yaml").write_text(json.dumps(CONFIGURATIONS), encoding="utf-8")


def comparisons(folder: Path, count: int) -> Figures:
    """The stage, with every filter that needs no model."""
    from almost_train.synthetic.comparisons import ComparisonSettings, synthesize_comparisons

    settings = ComparisonSettings(balance_length=True)
    result = synthesize_comparisons(settings, folder / "responses", folder / "ranking.yaml", folder / "out")
    return {"pairs": result["metrics"]["filters"]["responses"]["in"], "kept": result["metrics"]["comparisons"]}


# --- the filter of near-duplicates ---


def overlap(_: Path, count: int, *, plain: bool = False) -> Figures:
    """Mine until `count` prompts are kept; the digest is of every decision, with the nearest prompt and its score."""
    import hashlib

    from overlap_plain import Exhaustive, prompts

    from almost_train.synthetic.overlap import OverlapIndex

    index = Exhaustive(0.5) if plain else OverlapIndex(0.5)
    digest, kept, seen, making = hashlib.sha256(), 0, 0, 0.0
    stream = prompts(100 * count)
    while kept < count:
        began = time.process_time()
        text = next(stream)
        making += time.process_time() - began
        nearest = index.nearest(text)
        digest.update(repr(nearest).encode())
        seen += 1
        if nearest is None:
            index.add(text)
            kept += 1
    return {"candidates": seen, "making_s": making, "decisions": digest.hexdigest()[:16]}


# --- reports ---


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

        from almost_eval.run.store import record_to_dict
        from almost_eval.run.texts import score_texts

        records = [replace(one, score=score_texts(task, one.sample, one.outputs)) for one in records]
        write_rows(target / "samples.jsonl", map(record_to_dict, records))
        allowed = {name: entry["allowed"] for name, entry in results["validity"]["checks"].items()}
        again = summarise(task, records, check(records, count, allowed), spec, results["engine"])
        write_json(target / "results.json", results | again)
    shutil.rmtree(small)


def page(folder: Path, count: int) -> Figures:
    """The page of a run: written."""
    from almost_eval.report.page import write_page

    done = write_page([folder / "run"], folder / "report.html")
    return {"page_mib": done.size / 2**20, "samples": done.n_samples}


def opened(folder: Path, count: int) -> Figures:
    """The page in a real chromium: shown, a filter, a search over all samples, a jump to the last."""
    import os

    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = os.environ.get("ALMOST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        seconds = []
        for _ in range(3):
            tab = browser.new_page()
            began = time.perf_counter()
            tab.goto((folder / "report.html").as_uri())
            tab.wait_for_selector("#rows .row")
            tab.wait_for_selector("#detail h3")
            seconds.append(time.perf_counter() - began)
            if len(seconds) < 3:
                tab.close()
        began = time.perf_counter()
        tab.fill("#query", f"(case {count - 1})")
        tab.wait_for_function("() => document.getElementById('status').textContent.startsWith('1 of ')", timeout=60_000)
        searched = time.perf_counter() - began
        browser.close()
    return {"opened_s": min(seconds), "searched_s": searched}


def verified(folder: Path, count: int) -> Figures:
    """`verify` of the run."""
    from almost_eval.data.sources import DataSource
    from almost_eval.run.verify import verify_run

    verification = verify_run(folder / "run", DataSource("nano", None))
    return {"problems": len(verification.problems)}


def compared(folder: Path, count: int) -> Figures:
    """`compare` of two runs."""
    from almost_eval.compare.comparison import compare_runs

    return {"shared": compare_runs(folder / "run", folder / "other").shared}


# --- journals ---


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


class Reviews(Sequence[Any]):
    """The requests of a run, each made when it is looked at."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return review(i)[0]


def resumed(folder: Path, count: int) -> Figures:
    """Open; go on with a run whose replies are all there; append; add up the ledger."""
    from almost_eval.judge.api.client import JudgeClient
    from almost_eval.judge.api.journal import Journal

    began = time.process_time()
    with Journal(folder / "journal.sqlite") as journal:
        figures = {"open_cpu_s": time.process_time() - began}
        began = time.process_time()
        client = JudgeClient(
            "judge", journal, base_url="http://127.0.0.1:9/v1"
        )  # nobody answers there, and none is asked
        known = sum(getattr(outcome, "cached", False) for _, outcome in client.stream(Reviews(count)))
        assert known == count, f"{known} of {count} replies came from the journal"
        figures["each_review_us"] = 1e6 * (time.process_time() - began) / count
        began = time.process_time()
        for i in range(count, count + 200):
            journal.put(*review(i))
        figures["append_us"] = 1e6 * (time.process_time() - began) / 200
        began = time.process_time()
        assert journal.ledger().billed.prompt == 800 * (count + 200)
        figures["ledger_cpu_s"] = time.process_time() - began
        began = time.process_time()
        assert len(journal.waits()) >= count
        figures["waits_cpu_s"] = time.process_time() - began
    return figures


# --- one size, and several ---


def exhaustive(folder: Path, count: int) -> Figures:
    """The plain path of `overlap`."""
    return overlap(folder, count, plain=True)


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "comparisons": make_answers,
    "report": make_run,
    "journal": make_journal,
}
MEASURES: dict[str, tuple[Callable[[Path, int], Figures], ...]] = {
    "comparisons": (comparisons,),
    "overlap": (overlap,),
    "report": (page, opened, verified, compared),
    "journal": (resumed,),
}
EVERY = {of.__name__: of for measures in MEASURES.values() for of in measures} | {"exhaustive": exhaustive}


def own_process(what: str, folder: Path, count: int) -> Figures:
    """Run one function of this file in a process of its own; what it measured."""
    command = [sys.executable, __file__, "one", what, str(folder), str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def one(what: str, folder: Path, count: int) -> None:
    """In the process of its own."""
    if what.startswith("make-"):
        MAKERS[what.removeprefix("make-")](folder, count)
        print("{}")
        return
    figures = EVERY[what](folder, count)
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures["cpu_s"] = used.ru_utime - figures.pop("making_s", 0.0)
    figures["peak_mib"] = used.ru_maxrss / 1024
    print(json.dumps(figures))


def measure(what: str, sizes: Sequence[int], scratch: Path | None) -> list[str]:
    """Print a line for each size; what is missed."""
    missed, before = [], dict[str, tuple[int, Figures]]()
    for count in sizes:
        folder = Path(tempfile.mkdtemp(prefix="almost-sizes-", dir=scratch))
        try:
            if what in MAKERS:
                own_process(f"make-{what}", folder, count)
            for of in MEASURES[what]:
                figures = own_process(of.__name__, folder, count)
                told = ", ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
                                 for name, value in figures.items())  # fmt: skip
                print(f"{of.__name__:12} {count:>9,}: {told}", flush=True)
                missed += bounds(of.__name__, count, figures)
                if of.__name__ in before:
                    smaller, then = before[of.__name__]
                    grown = {key: figures[key] / then[key] for key in ("cpu_s", "peak_mib") if then[key]}
                    told = ", ".join(f"{name} x {ratio:.2f}" for name, ratio in grown.items())
                    print(f"{'':12} {'':>9}  size x {count / smaller:.3g}: {told}", flush=True)
                before[of.__name__] = count, figures
            if what == "overlap" and count == sizes[0]:
                plain = own_process("exhaustive", folder, count)
                same = plain["decisions"] == before["overlap"][1]["decisions"]
                print(f"{'exhaustive':12} {count:>9,}: cpu_s {plain['cpu_s']:.4g}, same decisions: {same}", flush=True)
                missed += [] if same else [f"the index decides otherwise than the exhaustive path at {count:,}"]
        finally:
            shutil.rmtree(folder)
    return missed


def bounds(what: str, count: int, figures: Figures) -> list[str]:
    """What of the figures is beyond its bound."""
    missed = []
    if what in ("comparisons", "resumed") and figures["peak_mib"] >= GIBIBYTE:
        missed.append(f"{what} of {count:,}: {figures['peak_mib']:.0f} MiB, the bound is {GIBIBYTE:.0f}")
    if what == "opened" and figures["opened_s"] >= OPENS_WITHIN:
        missed.append(f"a page of {count:,} samples opened in {figures['opened_s']:.1f} s, the bound is {OPENS_WITHIN}")
    if figures.get("problems"):
        missed.append(f"verify of {count:,} samples has {figures['problems']} problems")
    return missed


def main() -> int:
    """Measure, print a line a figure, and say what is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, unit, default in (
        ("comparisons", "prompts", 1_000_000),
        ("overlap", "prompts", 100_000),
        ("report", "samples", 200_000),
        ("journal", "reviews", 1_000_000),
    ):
        command = commands.add_parser(name)
        told = "measured here, and at a tenth [default: %(default)s]"
        command.add_argument(f"--{unit}", type=int, default=default, dest="count", metavar="N", help=told)
        command.add_argument("--scratch", type=Path, metavar="DIR", help="where the inputs are made")
    hidden = commands.add_parser("one")
    for argument, kind in (("measure", str), ("folder", Path), ("count", int)):
        hidden.add_argument(argument, type=kind)
    arguments = parser.parse_args()
    if arguments.what == "one":
        one(arguments.measure, arguments.folder, arguments.count)
        return 0
    if arguments.count < 100:
        parser.error("at least 100")
    sizes = [arguments.count // 10, arguments.count]
    if arguments.what == "overlap":
        sizes.insert(1, arguments.count * 3 // 10)
    missed = measure(arguments.what, sizes, arguments.scratch)
    print("\n".join(missed) or "every bound is kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
