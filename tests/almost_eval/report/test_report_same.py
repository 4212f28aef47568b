"""Page, tables and exports of one run of each kind, compared with what version 0.3.0 made of the same folders.

`expected_report.txt` was written by that version. A test that fails here shows every change of what readers see.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report_fixtures import sample, write_run
from rich.console import Console

from almost_eval.report import views
from almost_eval.report.console import print_results
from almost_eval.report.exports import to_csv, to_latex, to_markdown, to_model_index
from almost_eval.report.runs import LoadedRun, RunSet, load_runs
from almost_eval.report.samples import pack
from almost_eval.types import SampleRecord, Score

EXPECTED = Path(__file__).with_name("expected_report.txt")
CATEGORY = {"anatomy": "stem", "physics": "stem", "law": "humanities", "cooking": "other"}


def metric(value: float | None, n: int = 4, **other: Any) -> dict[str, Any]:
    bounds = None if value is None else [value - 0.125, value + 0.125]
    return {"value": value, "stderr": 0.0625, "ci95": bounds, "n": n, "unscored": 1, **other}


def metrics(*names: str) -> dict[str, Any]:
    return {name: metric(0.25 + at / 64) for at, name in enumerate(names)}


def likelihoods(*rows: list[float]) -> dict[str, Any]:
    return {"loglikelihoods": list(rows)}


def make_runs(folder: Path) -> list[Path]:
    """A run of each task and protocol, a judged one, and one of a task that no version knows."""
    hhh = metrics("accuracy", "accuracy/helpful", "accuracy/honest", "accuracy/unheard_of")
    rules = {"longer response": metric(0.5)}
    pair = sample("helpful/0", group="helpful", gold=1, cluster="Human: Which?")
    orders = likelihoods([-1.0, -2.0], [-3.0, -4.0])
    one: dict[str, Any] = {"results": {"metrics": hhh, "baselines": rules, "details": {"tied": 2, "share": 0.25}}}
    write_run(folder / "0", [SampleRecord(pair, orders, Score(1.0))], **one)
    write_run(folder / "1", [SampleRecord(pair, orders, Score(0.0))], protocol="likelihood", **one)
    rewards = [SampleRecord(pair, {"rewards": [0.5, 1.5]}, Score(1.0))]
    write_run(folder / "2", rewards, protocol="reward", spec={"requires": "reward"}, **one)

    stored: dict[str, Any] = {"mc1": [0, 1], "mc1_gold": 0, "mc2": [0, 2, 1], "mc2_labels": [1, 1, 0]}
    question = sample("0", cluster="Is it?", **stored)
    names = ("mc1", "mc2", "mc1_true_prompt")
    write_run(
        folder / "3",
        [SampleRecord(question, likelihoods([-1.0, -2.0, -3.0], [-4.0], [-5.0]), Score(1.0, None, {"mc1": 1.0}))],
        task="truthfulqa",
        protocol="+".join(names),
        headline="mc1",
        spec={"settings": {"metrics": list(names), "limit": 7}, "data": {"source": "nano", "fingerprint": "a" * 64}},
        results={"metrics": metrics(*names)},
    )
    groups = [f"accuracy/{name}" for name in (*CATEGORY.values(), *CATEGORY)]
    letters = likelihoods([-1.0, -2.0, -3.0, -4.0])
    write_run(
        folder / "4",
        [
            SampleRecord(sample(f"{subject}/0", group=subject, gold=2, category=category), letters, Score(0.0))
            for subject, category in CATEGORY.items()
        ],
        task="mmlu",
        protocol="5-shot",
        spec={"settings": {"shots": 5}},
        results={
            "metrics": metrics("accuracy", "accuracy_macro", *groups),
            "baselines": {"always A": metric(0.25)},
        },
    )
    own = {"arc/acc": metric(0.5), "wiki/perplexity": metric(1234.5) | {"ci95": None}, "wins": metric(3.0)}
    for number, task in (("5", "harness"), ("6", "of_another_version")):
        write_run(
            folder / number,
            [SampleRecord(sample("arc/0", group="arc"), likelihoods([-1.0, -2.0]), Score(1.0))],
            task=task,
            protocol="a+b+c+d+e",
            headline="arc/acc",
            results={"metrics": own, "baselines": {"rule": metric(0.5)}},
        )
    systems = {"baseline": {"name": "base"}, "model": {"name": "mine"}}
    review = {"review": "text", "winner": "2", "lengths": [5, 9]}
    asked = sample("q/forward", cluster="q", group="maths", order="forward", baseline="base", model="mine")
    judging = {"first_wins": metric(0.5), "longer_wins": metric(None)}
    judged = write_run(
        folder / "7",
        [SampleRecord(asked, review, Score(1.0))],
        task="vicuna",
        protocol="gpt-4",
        headline="win_rate",
        spec={"settings": {"systems": systems}, "requires": "judge"},
        results={"metrics": metrics("win_rate", "wins", "total_score/mine"), "judging": judging},
    )
    (judged / "questions.jsonl").write_text('{"question_id": "q", "text": "Why?"}\n{"question_id"')
    return sorted(folder.iterdir())


def console_of(run: LoadedRun) -> str:
    console = Console(file=io.StringIO(), width=100, emoji=False, highlight=False)
    print_results(run.results, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def page_of(run_set: RunSet) -> Iterator[str]:
    """What the template and the page's script read, without the drawings themselves."""
    for section in views.sections(run_set):
        for plot in section["plots"]:
            plot["svg"] = plot["svg"].partition(">")[0]
        for forest in section["forests"]:
            forest["compact"] = bool(forest.get("compact"))
        yield json.dumps(section, sort_keys=True)
    yield json.dumps(views.headline_rows(run_set), sort_keys=True)
    yield json.dumps(pack(run_set).index, sort_keys=True)


def readers_see(folder: Path) -> str:
    """Every form of the runs, one below the other."""
    folders = make_runs(folder)
    run_set = load_runs(folders)
    parts = [*page_of(run_set), to_csv(run_set, None), to_markdown(run_set, None), to_latex(run_set, None)]
    for run_folder in folders:
        alone = load_runs([run_folder])
        parts += [to_model_index(alone), *([] if alone.runs[0].task == "vicuna" else [console_of(alone.runs[0])])]
    return "\n".join(parts).replace(str(folder), "RUNS").replace("\r\n", "\n")


def test_readers_see_the_same(tmp_path: Path) -> None:
    assert readers_see(tmp_path / "runs").splitlines() == EXPECTED.read_text(encoding="utf-8").splitlines()
