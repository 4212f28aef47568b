"""`almost-eval report`: what goes to the terminal, what into a file, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from report_fixtures import sample, write_run

from almost_eval.cli.command_line import run_command_line
from almost_eval.cli.report import report as command
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["report_fixtures"]

Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """The command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["almost-eval report", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_command_line(command, "almost-eval report")
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


def test_one_run_is_shown_as_before(nano_runs: Path, report: Report) -> None:
    folder = nano_runs / "hhh"
    stored = json.loads((folder / "results.json").read_text())
    code, out, err = report(folder)
    assert (code, err) == (0, "")
    assert "hhh · choice · nano/almost" in out
    assert f"{stored['metrics']['accuracy']['value']:.1%}" in out
    assert out.rstrip().endswith(f"run: {folder}")
    assert json.loads(report(folder, "--json")[1]) == stored


def test_several_runs(nano_runs: Path, report: Report) -> None:
    code, out, err = report(nano_runs)
    assert (code, err) == (0, "")
    assert "differences from nano/almost" in out
    assert "nano/vanilla-small" in out
    found = json.loads(report(nano_runs, "--json")[1])
    assert len(found["runs"]) == 5
    (compared,) = found["comparisons"]
    assert (compared["baseline"], compared["model"]) == ("nano/almost", "nano/vanilla-small")
    assert 0 <= compared["p_holm"] <= 1


def test_files_by_their_suffix(nano_runs: Path, report: Report, tmp_path: Path) -> None:
    files = [tmp_path / "out" / f"report{suffix}" for suffix in (".html", ".md", ".csv", ".tex", ".yaml")]
    outputs = [argument for file in files for argument in ("-o", file)]
    code, out, err = report(nano_runs / "hhh", *outputs)
    assert code == 0
    assert "hhh · choice" in out  # the terminal says what it always says
    assert [line.split(":")[0] for line in err.splitlines()] == ["page", "table", "table", "table", "table"]
    page, *tables = (file.read_bytes().decode() for file in files)
    assert page.startswith("<!DOCTYPE html>")
    flags = ("--markdown", "--csv", "--latex", "--model-index")
    assert [report(nano_runs / "hhh", flag)[1].encode() for flag in flags] == [table.encode() for table in tables]


def test_a_withheld_headline(report: Report, tmp_path: Path) -> None:
    why = "1 of 1 samples are missing"
    validity = {"passed": False, "reason": why, "checks": {}}
    held = {"value": None, "stderr": None, "ci95": None, "n": 0, "unscored": 1, "withheld": why}
    results = {"validity": validity, "metrics": {"accuracy": held}}
    folder = write_run(tmp_path / "run", [SampleRecord(sample("1"), {}, Score(None))], results=results)
    code, _, _ = report(folder, "-o", tmp_path / "report.html")
    assert code == 3
    page = (tmp_path / "report.html").read_text()
    assert why in page
    assert '<span class="badge bad">withheld</span>' in page


def refused(report: Report, *arguments: object) -> str:
    code, out, err = report(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_refused_in_one_line(nano_runs: Path, report: Report, tmp_path: Path) -> None:
    hhh = nano_runs / "hhh"
    assert "Missing argument 'DIR...'" in refused(report)
    assert "results.json is not there; give the folder of a run" in refused(report, tmp_path / "nope")
    assert "told by its suffix: .html, .md, .csv" in refused(report, hhh, "-o", tmp_path / "report.pdf")
    assert "--baseline x: no such model; known: nano/almost" in refused(report, nano_runs, "--baseline", "x")
    assert "no two models have a run of the same" in refused(report, hhh, "--baseline", "nano/almost")
    assert "is given twice" in refused(report, hhh, hhh)
    assert "a model card is about one model" in refused(report, nano_runs, "--model-index")
    assert "--json and a table would both go" in refused(report, hhh, "--json", "--csv")
    (tmp_path / "file").write_text("")
    for name in ("report.html", "table.csv"):
        assert f"cannot write {tmp_path}/file/{name}" in refused(report, hhh, "-o", tmp_path / "file" / name)


def test_an_unfinished_run_is_named(nano_runs: Path, report: Report, tmp_path: Path) -> None:
    import shutil

    for name in ("hhh", "mmlu"):
        shutil.copytree(nano_runs / name, tmp_path / name)
    (tmp_path / "mmlu/results.json").unlink()
    code, out, _ = report(tmp_path, "-o", tmp_path / "report.html")
    assert code == 0
    assert "hhh · choice" in out
    assert "Not finished:" in (tmp_path / "report.html").read_text()
    (tmp_path / "hhh/results.json").unlink()
    assert "holds no finished run; unfinished: " in refused(report, tmp_path)


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys\nfrom almost_eval.cli.report import report\n"
        "assert not {'numpy', 'jinja2', 'matplotlib', 'scipy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
