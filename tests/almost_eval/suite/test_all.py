"""`almost-eval all`: one load, one plan, one page; what fails leaves the rest alone; what was killed goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from almost_eval.cli.all import Display
from almost_eval.cli.main import main
from almost_eval.errors import InputError
from almost_eval.nano.seeded import checkpoint
from almost_eval.run.runner import RunRequest
from almost_eval.suite.plan import Planned, SuiteRequest, choose, suite_names, with_defaults

Command = Callable[..., Any]
PROGRAM = Path(sys.executable).with_name("almost-eval")
FEW = ("--limit", 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all tasks, two samples each; what was said stands beside it."""
    folder = tmp_path_factory.mktemp("all") / "run"
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["almost-eval", "all", *map(str, FEW), "--output", str(folder)])
        patch.delenv("ALMOST_DATA_ROOT", raising=False)
        with pytest.raises(SystemExit) as exit:
            main()
    assert exit.value.code == 0, err.getvalue()
    (folder.parent / "stdout").write_text(out.getvalue())
    (folder.parent / "stderr").write_text(err.getvalue())
    return folder


def environment() -> dict[str, str]:
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    given.pop("ALMOST_DATA_ROOT", None)
    return given


def test_every_task_has_its_folder_and_the_table_its_row(whole: Path) -> None:
    out = (whole.parent / "stdout").read_text()
    for name in suite_names():
        results = json.loads((whole / name / "results.json").read_text())
        assert (whole / name / "spec.json").exists()
        assert (whole / name / "samples.jsonl").exists()
        (row,) = (line for line in out.splitlines() if f"│ {name} " in line)
        metric = results["metrics"][results["headline"]]
        assert f" {100 * metric['value']:.1f} " in row
        assert f" {100 * metric['ci95'][0]:.1f} to {100 * metric['ci95'][1]:.1f} " in row
        assert f" {results['timing']['seconds']:.1f} " in row
    assert out.endswith(f"page: {whole / 'report.html'}\n")
    page = (whole / "report.html").read_text()
    for title in ("Static HHH", "TruthfulQA", "MMLU", "Vicuna"):
        assert title in page


def test_the_plan_comes_first_and_counts_what_is_computed(whole: Path) -> None:
    """Standard error has the plan; its tokens are those that the engine then computed."""
    err = (whole.parent / "stderr").read_text()
    total = 0
    for name in suite_names():
        (row,) = (line for line in err.splitlines() if f"│ {name} " in line)
        results = json.loads((whole / name / "results.json").read_text())
        if computed := results["engine"].get("tokens_computed"):
            assert f" {computed:,} " in row
            total += computed
    assert total > 0


def test_it_is_as_the_commands_of_their_own_would_do(whole: Path, almost_eval: Command, tmp_path: Path) -> None:
    given = ["truthfulqa", "--metrics", "mc1,mc2,mc1_true_prompt", *FEW, "--json", "--output"]
    alone = json.loads(almost_eval(*given, tmp_path / "alone").out)
    together = json.loads((whole / "truthfulqa/results.json").read_text())
    assert alone["metrics"] == together["metrics"]
    # The folders are interchangeable: each command finds the run of `all` to be its own, and done.
    vicuna = json.loads(almost_eval("vicuna", *FEW, "--json", "--output", whole / "vicuna").out)
    assert json.loads(almost_eval(*given, whole / "truthfulqa").out) == together
    assert vicuna["timing"]["samples_computed_now"] == 0
    assert almost_eval("hhh", "--protocol", "reward", *FEW, "--output", whole / "hhh-reward").code == 0


def test_again_nothing_is_computed(whole: Path, almost_eval: Command) -> None:
    before = {name: (whole / name / "samples.jsonl").read_bytes() for name in suite_names()}
    plan = json.loads(almost_eval("all", *FEW, "--output", whole, "--dry-run", "--json").out)
    assert (plan["read"], plan["write"]) == (0, 0)
    assert all(task["done"] == task["samples"] > 0 for task in plan["tasks"].values())

    done = almost_eval("all", *FEW, "--output", whole, "--json")
    assert (done.code, done.err) == (0, "")
    assert {name: (whole / name / "samples.jsonl").read_bytes() for name in suite_names()} == before
    assert json.loads(done.out) == json.loads((whole / "all.json").read_text())


def test_weights_are_read_once(almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from almost_eval.engines import hf

    loaded = []
    original = hf.load_weights

    def load(auto_class: Any, found: Any, **options: Any) -> Any:
        loaded.append(found.name)
        return original(auto_class, found, **options)

    monkeypatch.setattr("almost_eval.rewards.hf.load_weights", load)
    monkeypatch.setattr("almost_eval.engines.hf.load_weights", load)
    tasks = "hhh,vicuna"
    assert almost_eval("all", "--limit", 1, "--tasks", tasks, "--output", tmp_path / "run").code == 0
    assert sorted(loaded) == ["nano/almost", "nano/reward", "nano/vanilla-medium"]


def test_a_task_that_cannot_run_leaves_the_others_done(almost_eval: Command, tmp_path: Path) -> None:
    """A reward model that is none."""
    given = ["all", *FEW, "--reward-model", "nano/almost", "--tasks", "hhh", "--output", tmp_path / "run"]
    done = almost_eval(*given)
    assert done.code == 1
    assert "hhh-reward failed:" in done.out
    assert "holds a LlamaForCausalLM; this needs a *SequenceClassification*" in done.out
    for name in ("hhh-choice", "hhh-likelihood"):
        assert (tmp_path / "run" / name / "results.json").exists()
    told = json.loads((tmp_path / "run/all.json").read_text())
    assert told["exit_code"] == 1
    assert told["tasks"]["hhh-reward"]["results"] is None
    assert "LlamaForCausalLM" in told["tasks"]["hhh-reward"]["failed"]


def test_a_task_that_fails_while_it_runs_leaves_the_others_done(
    almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that nobody foresaw: the reason is shown in a line, the traceback is kept."""

    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault\nof two lines")

    monkeypatch.setattr("almost_eval.rewards.hf.HFRewardModel.stream", fault)
    done = almost_eval("all", *FEW, "--tasks", "hhh", "--output", tmp_path / "run", "--json")
    tasks = json.loads(done.out)["tasks"]
    kept = tmp_path / "run/hhh-reward/traceback.txt"
    assert done.code == 1
    assert tasks["hhh-reward"]["failed"] == f"ZeroDivisionError: a fault (see {kept})"
    assert "of two lines" in kept.read_text()
    assert tasks["hhh-choice"]["results"]["validity"]["passed"]


def test_a_withheld_headline_is_exit_code_3(almost_eval: Command, tmp_path: Path) -> None:
    longest = json.loads(almost_eval("mmlu", *FEW, "--dry-run", "--json").out)["longest_prompt"]
    given = ["all", *FEW, "--tasks", "mmlu", "--output", tmp_path / "run", "--max-length", longest - 1]
    done = almost_eval(*given)
    assert done.code == 3
    assert "mmlu, headline withheld: " in done.out
    (row,) = (line for line in done.out.splitlines() if "│ mmlu " in line)
    assert " withheld " in row
    assert " no " in row


def test_killed_it_goes_on(tmp_path: Path, almost_eval: Command) -> None:
    folder = tmp_path / "run"
    given = [
        "all",
        "--limit",
        "20",
        "--tasks",
        "hhh-choice,truthfulqa",
        "--output",
        str(folder),
        "--batch-tokens",
        "128",
    ]
    process = subprocess.Popen(
        [PROGRAM, *given], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines = folder / "truthfulqa/samples.jsonl"
    while not (lines.exists() and lines.stat().st_size):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (folder / "hhh-choice/samples.jsonl").read_bytes()
    assert not (folder / "truthfulqa/results.json").exists()
    plan = json.loads(almost_eval(*given, "--dry-run", "--json").out)
    there = plan["tasks"]["truthfulqa"]
    assert plan["tasks"]["hhh-choice"]["read"] == 0 < there["read"]
    assert 0 < there["done"] < there["samples"]

    done = almost_eval(*given, "--json")
    assert done.code == 0
    results = json.loads(done.out)["tasks"]["truthfulqa"]["results"]
    assert results["timing"]["samples_computed_now"] == there["samples"] - there["done"]
    assert (folder / "hhh-choice/samples.jsonl").read_bytes() == first
    whole = tmp_path / "whole"
    uninterrupted = almost_eval(*given[:-3], str(whole), *given[-2:], "--json")
    again = json.loads(uninterrupted.out)["tasks"]["truthfulqa"]["results"]
    assert again["provenance"]["samples_digest"] == results["provenance"]["samples_digest"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks", "hhhh"], "--tasks: unknown task 'hhhh'; did you mean 'hhh'?"),
        (
            ["--tasks", "mmlu", "--reward-model", "nano/reward"],
            "--reward-model is for hhh-reward, which --tasks leaves",
        ),
        (["--tasks", "hhh", "--baseline", "nano/sft"], "--baseline is for vicuna, which --tasks leaves out"),
        (["--model", "nope"], "no model at 'nope'"),
        (["--model", "folder", "--data", "nano"], "folder is not a model: it has no config.json"),
        (["--template", "vicunna"], "unknown chat template 'vicunna': did you mean 'vicuna'?"),
        (["--data", "nan"], "unknown data 'nan'"),
        (["--dtype", "float3"], "unknown dtype 'float3'"),
        (["--allow", "missing=2"], "give a share from 0 to 1"),
        (["--max-length", "8"], "no sample fits"),
        (["--output", "taken"], 'taken/hhh-choice holds another run: task was "another", is "hhh"'),
        (["--model", "copy", "--data", "nano", "--baseline", "nano/sft"], "somebody must compare the two"),
        (["--model", "copy", "--data", "nano", "--judge", "nano"], "give a checkpoint or answer file as --baseline"),
        (["--model", "copy", "--data", "nano", "--tasks", "hhh-reward"], "--tasks hhh-reward: it needs --reward-model"),
        (["--model", "copy", "--data", "nano", "--tasks", "vicuna"], "--tasks vicuna: it needs --judge and --baseline"),
    ],
)
def test_refused_in_one_line(
    arguments: list[str], expected: str, almost_eval: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("hhh-choice", "hhh-likelihood", "truthfulqa", "mmlu"):
        Path("taken", name).mkdir(parents=True)
        Path("taken", name, "spec.json").write_text('{"schema": 1, "task": "another"}')
    if "copy" in arguments:
        shutil.copytree(checkpoint("nano/seeded"), "copy")
    monkeypatch.setattr("almost_eval.rewards.hf.load_weights", loaded)
    monkeypatch.setattr("almost_eval.engines.hf.load_weights", loaded)
    code, out, err = almost_eval("all", "--limit", 1, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not Path("runs").exists()


def test_one_display_for_all() -> None:
    """The upper bar counts the tokens of the plan; the lower one is the task at work, and goes when it is over."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    shown = StringIO()
    planned = [
        Planned("hhh-choice", Path("a"), samples=4, done=2, read=60),
        Planned("mmlu", Path("b"), refused="no"),
        Planned("vicuna", Path("c"), read=10, write=30),
    ]
    with Bars(console=Console(file=shown, force_terminal=True), auto_refresh=False) as bars:
        progress = Display(planned, bars)
        whole = bars.tasks[0]
        assert whole.total == 100
        progress.begin(planned[0])
        with progress.track("hhh choice", 4, 2) as advance:
            advance(1)
            assert (whole.completed, bars.tasks[1].completed) == (30, 3)
        progress.end("hhh-choice")
        progress.end("mmlu")
        assert (whole.completed, len(bars.tasks)) == (60, 1)
        progress.begin(planned[2])
        with progress.track("answers of a", 7) as advance:
            advance(7)
        progress.note("going on")
        progress.end("vicuna")
        assert whole.finished
    assert "going on" in shown.getvalue()


def suite(model: str | None = None, data: str | None = None, **more: Any) -> SuiteRequest:
    return SuiteRequest(base=RunRequest(task="", model=model, data=data), **more)


def test_what_a_model_brings_along() -> None:
    def brought(**more: Any) -> list[str | None]:
        request = with_defaults(suite(**more))
        return [request.base.model, request.reward_model, request.judge.judge, request.baseline]

    assert brought() == ["nano/almost", "nano/reward", "nano", "nano/vanilla-medium"]
    assert brought(baseline="a.jsonl") == ["nano/almost", "nano/reward", "nano", "a.jsonl"]
    assert brought(data="hub") == ["nano/almost", None, None, "nano/vanilla-medium"]
    assert brought(model="nano/vanilla-medium") == ["nano/vanilla-medium", "nano/reward", None, None]
    assert brought(model="./ckpt") == ["./ckpt", None, None, None]


def test_which_tasks_run() -> None:
    def chosen(*tasks: str, model: str | None = None) -> list[str]:
        return choose(replace(with_defaults(suite(model)), tasks=tasks))

    assert chosen() == list(suite_names())
    assert chosen(model="./ckpt") == ["hhh-choice", "hhh-likelihood", "truthfulqa", "mmlu"]
    assert chosen("mmlu", "hhh", model="./ckpt") == ["hhh-choice", "hhh-likelihood", "mmlu"]
    assert chosen("hhh") == ["hhh-reward", "hhh-choice", "hhh-likelihood"]
    with pytest.raises(InputError, match="needs --reward-model"):
        chosen("hhh-reward", model="./ckpt")
