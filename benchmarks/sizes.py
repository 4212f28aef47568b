"""What grows with a run: memory, time and their growth at a hundred thousand and a million.

    python benchmarks/sizes.py responses --prompts 1000000     (four configurations, no model; 5 GB)
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
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sizes_inputs import CONFIGURATIONS, MAKERS, ROOT, WORDS, review

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "almost_train" / "synthetic")]

GIBIBYTE = 1024.0  # MiB
OPENS_WITHIN = 3.0  # seconds

Figures = dict[str, Any]


# --- responses and comparisons ---


class Talker:
    """An engine: words that depend on the prompt. (`ScriptedEngine` counts those of each prompt, which takes long.)"""

    def stream_completions(self, prompts: Sequence[str], params: Any) -> Iterator[tuple[int, list[Any]]]:
        """One completion of each."""
        from almost_eval.types import Completion

        for number, prompt in enumerate(prompts):
            rng = random.Random(zlib.crc32(prompt.encode()))
            text = " ".join(rng.choices(WORDS, k=rng.randint(5, 80))) + rng.choice(".....!?")
            yield number, [Completion(" " + text, (), "stop")]

    def generate(self, prompts: Sequence[str], params: Any) -> list[list[Any]]:
        """The same in a list."""
        return [completions for _, completions in self.stream_completions(prompts, params)]


def responses(folder: Path, count: int) -> Figures:
    """The stage, with an engine that is no model: its answers are made of the words of `make_answers`."""
    from almost_eval.data.sources import DataSource
    from almost_train.synthetic.responses import Configuration, ResponseSettings, synthesize_responses

    configurations = [Configuration(name, "scripted", "better", int(name[-1])) for name in CONFIGURATIONS]
    result = synthesize_responses(
        ResponseSettings(prompt_set="builtin"),
        folder / "prompts.jsonl",
        configurations,
        folder / "out",
        data=DataSource("nano", None),
        engine_for=lambda _: Talker(),
    )
    return {"kept": sum(of["kept"] for of in result["metrics"]["configurations"].values())}


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


MEASURES: dict[str, tuple[Callable[[Path, int], Figures], ...]] = {
    "responses": (responses,),
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
    if what in ("responses", "comparisons", "resumed") and figures["peak_mib"] >= GIBIBYTE:
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
        ("responses", "prompts", 1_000_000),
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
