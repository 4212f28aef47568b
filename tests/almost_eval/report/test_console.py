"""The table: every name literally, every number in its unit, nothing hidden."""

import io
from typing import Any

import pytest
from rich.console import Console

from almost_eval.progress import TerminalProgress, progress_for
from almost_eval.report.console import MANY_ROWS, print_preflight, print_results


def metric(value: float | None = 0.5, **other: Any) -> dict[str, Any]:
    return {"value": value, "stderr": 0.1, "ci95": [0.4, 0.6], "n": 10, "unscored": 0, **other}


def results(**other: Any) -> dict[str, Any]:
    return {
        "task": "hhh",
        "protocol": "choice",
        "model": "m",
        "headline": "accuracy",
        "metrics": {"accuracy": metric()},
        "baselines": {},
        "details": {},
        "validity": {"passed": True, "reason": None, "checks": {"truncated": {"count": 0, "allowed": 0.01}}},
        "engine": {"path": "plain", "warnings": []},
        **other,
    }


def shown(found: dict[str, Any], folder: str | None = None, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, emoji=False, highlight=False)
    print_results(found, console, folder=folder)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("│┃").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_shares_are_percentages() -> None:
    metrics = {
        "accuracy": metric(0.12345, n=9, unscored=1),
        "empty": metric(None, ci95=None, n=0, unscored=10),
    }
    assert rows(shown(results(metrics=metrics))) == [
        ["accuracy", "12.3%", "40.0% to 60.0%", "9", "1"],
        ["empty", "-", "-", "0", "10"],
    ]


def test_the_metrics_of_lm_eval_keep_their_units() -> None:
    metrics = {"accuracy": metric(0.12345), "bleu": metric(0.2), "perplexity": metric(1234.56, ci95=None)}
    assert rows(shown(results(task="harness", metrics=metrics))) == [
        ["accuracy", "0.1235", "0.4 to 0.6", "10", ""],
        ["bleu", "0.2", "0.4 to 0.6", "10", ""],
        ["perplexity", "1235", "-", "10", ""],
    ]


@pytest.mark.parametrize("name", ["[red]x", "[/red]", "[bold]", ":smile:", "a\\", "\\[x]", "[link=http://x]y[/link]"])
def test_names_are_shown_literally(name: str) -> None:
    found = results(
        model=name,
        metrics={"accuracy": metric(), name: metric()},
        baselines={name: metric()},
        details={name: 3},
        engine={"warnings": [name]},
    )
    found["validity"] = {"passed": False, "reason": name, "checks": {}}
    text = shown(found, folder=f"runs/{name}")
    assert f"hhh · choice · {name}" in text
    assert [row[0] for row in rows(text)] == ["accuracy", name, name]
    assert f"counted: {name} 3\n" in text
    assert f"headline withheld: {name}\n" in text
    assert f"warning: {name}\n" in text
    assert f"run: runs/{name}\n" in text


def test_a_withheld_headline_shows_no_number() -> None:
    found = results(metrics={"accuracy": metric(None, ci95=None, withheld="3 of 10 samples are missing")})
    found["validity"] = {
        "passed": False,
        "reason": "3 of 10 samples are missing",
        "checks": {"missing": {"count": 3, "allowed": 0.01}},
    }
    text = shown(found)
    assert rows(text) == [["accuracy", "withheld", "-", "10", ""]]
    assert "counted: missing 3\nheadline withheld: 3 of 10 samples are missing\n" in text


def test_what_the_engine_did() -> None:
    engine = {
        "tokens_computed": 1100,
        "tokens_in_trie": 1000,
        "tokens_plain": 9944,
        "warnings": ["prefixes are not shared: a reason"],
    }
    text = shown(results(engine=engine))
    assert "1,100 tokens computed, 1.10 x the 1,000 distinct ones; 9.0 x fewer than one by one\n" in text
    assert "warning: prefixes are not shared: a reason\n" in text


def test_details() -> None:
    text = shown(results(details={"tied": 0, "first shown preferred": 0.896, "dropped": 2}))
    assert "counted: first shown preferred 89.6%, dropped 2\n" in text


def test_long_paths_and_reasons_are_not_broken_or_lost() -> None:
    path = "runs/" + "long-" * 60
    text = shown(results(engine={"warnings": ["word " * 60]}), folder=path, width=60)
    assert f"run: {path}\n" in text
    assert text.count("word") == 60


def test_subjects_are_folded_and_counted() -> None:
    metrics = {"accuracy": metric(), "accuracy_macro": metric(), "accuracy/stem": metric()}
    metrics |= {f"accuracy/subject_{i}": metric() for i in range(57)}
    text = shown(results(task="mmlu", metrics=metrics))
    assert [row[0] for row in rows(text)] == ["accuracy", "accuracy_macro", "accuracy/stem"]
    assert "57 more metrics in results.json\n" in text
    few = dict(list(metrics.items())[:MANY_ROWS])
    assert len(rows(shown(results(task="mmlu", metrics=few)))) == MANY_ROWS


@pytest.mark.parametrize("task", ["harness", "of another version"])
def test_many_metrics_of_other_tasks_are_folded_too(task: str) -> None:
    metrics = {f"task_{i}/acc": metric() for i in range(30)} | {"mean": metric()}
    text = shown(results(task=task, headline="task_1/acc", metrics=metrics))
    assert [row[0] for row in rows(text)] == ["task_1/acc", "mean"]
    assert "29 more metrics in results.json\n" in text


def test_preflight_is_shown_literally() -> None:
    console = Console(file=io.StringIO(), width=60)
    facts = {"prompt": "[red]x[/red] :smile:\n  two  spaces", "longest_prompt": 7, "labels": [[[1, " A"]]]}
    print_preflight(facts, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\n[red]x[/red] :smile:\n  two  spaces\n" in text
    assert "\nlongest prompt: 7\nlabels: [[[1, ' A']]]\n" in text


def test_a_prompt_is_shown_without_what_a_terminal_obeys() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_preflight({"prompt": "one\n\x1b[31mtwo"}, console)
    assert isinstance(console.file, io.StringIO)
    assert "one\n\\x1b[31mtwo" in console.file.getvalue()


# --- progress


def test_no_progress_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    progress = progress_for(stream)
    progress.note("begins")
    with progress.track("work", 3) as advance:
        advance()
        advance(2)
    assert stream.getvalue() == ""
    progress.notice("waits a minute")
    assert stream.getvalue() == "waits a minute\n"
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(progress_for(Terminal()), TerminalProgress)
    progress = TerminalProgress()
    stream = Terminal()
    progress._console = Console(file=stream, force_terminal=True, width=100)
    progress.note("going on in [red]x")
    with progress.track("[bold]work", 10, 4) as advance:
        advance(6)
    assert "going on in [red]x" in stream.getvalue()
    assert "[bold]work" in stream.getvalue()
    assert "10/10" in stream.getvalue()
    assert capsys.readouterr().out == ""
