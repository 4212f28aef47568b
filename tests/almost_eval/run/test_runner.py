"""The loop: what it stores, that it survives being killed, and that it refuses what it must."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import Forks, forks
from machine_time import seconds_to_end

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import InputError, RunError, StoreError
from almost_eval.run.runner import Run
from almost_eval.tasks.base import GenerationRequest, Prompting, Task, choice_score
from almost_eval.types import LoglikelihoodRequest, Message, Metric, Outputs, Sample, SampleRecord, Score


@pytest.fixture(scope="module")
def start() -> Iterator[Forks]:
    from almost_eval.nano.data import data_root
    from almost_eval.nano.seeded import checkpoint

    for name in ("nano/seeded", "nano/seeded-reward"):
        checkpoint(name)
    data_root()
    modules = "transformers.models.llama.modeling_llama almost_eval.engines.hf_loglikelihood almost_eval.run.runner"
    modules += " almost_eval.rewards.hf almost_eval.report.console rich.progress almost_eval.tasks.hhh"
    modules += " almost_eval.tasks.truthfulqa almost_eval.nano.data almost_eval.nano.seeded"
    with forks(*modules.split()) as started:
        yield started


def results(folder: Path) -> dict[str, Any]:
    """`results.json` without its times."""
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in content.items() if key != "timing"}


def ids(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "samples.jsonl").read_text().splitlines()]


def beside(folder: Path, name: str) -> Path:
    """A working folder in which `--output run` is the same argument as in another."""
    (folder / name).mkdir()
    return folder / name


CHOICE = ["hhh", "--limit", 6, "--batch-tokens", 64, "--output", "run"]


@pytest.fixture(scope="module")
def whole(start: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    process = start(*CHOICE, cwd=cwd)
    assert (process.wait(), process.err.read_text()) == (0, "")
    return cwd / "run"


def test_killed_at_ten_points(start: Forks, whole: Path, tmp_path: Path) -> None:
    samples = tmp_path / "run/samples.jsonl"
    n = len(ids(whole))
    for lines in [0, *sorted(random.Random(2).sample(range(1, n - 5), 9))]:
        process = start(*CHOICE, cwd=tmp_path)
        assert process.until_lines(samples, lines)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "run/results.json").exists()
        if samples.exists():
            with samples.open("a") as stream:
                stream.write('{"id": "helpful/0", "sc')  # as a kill in the middle of a write leaves it
    process = start(*CHOICE, cwd=tmp_path)
    assert (process.wait(), process.err.read_text()) == (0, "")
    assert results(tmp_path / "run") == results(whole)
    assert sorted(ids(tmp_path / "run")) == sorted(ids(whole))
    assert len(set(ids(whole))) == n == 24


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("truthfulqa --metrics mc1,mc2,mc1_true_prompt --batch-tokens 64 --limit 20", id="truthfulqa"),
        pytest.param("hhh --protocol reward --batch-tokens 64 --limit 10", id="reward"),
        pytest.param("hhh --batch-tokens 64", id="all of hhh", marks=pytest.mark.slow),
        pytest.param("hhh --batch-tokens 64 --no-share-prefixes --limit 8", id="plain", marks=pytest.mark.slow),
        pytest.param("hhh --protocol likelihood --normalise --batch-size 2", id="likelihood", marks=pytest.mark.slow),
        pytest.param("mmlu --batch-tokens 64", id="mmlu", marks=pytest.mark.slow),
    ],
)
def test_killed_under_other_protocols(command: str, start: Forks, tmp_path: Path) -> None:
    given = [*command.split(), "--output", "run"]
    undisturbed, killed = beside(tmp_path, "undisturbed"), beside(tmp_path, "killed")
    process = start(*given, cwd=undisturbed)
    assert (process.wait(), process.err.read_text()) == (0, "")
    n = len(ids(undisturbed / "run"))
    for lines in sorted(random.Random(n).sample(range(n), 10 if n > 60 else 2)):
        process = start(*given, cwd=killed)
        assert process.until_lines(killed / "run/samples.jsonl", lines)
        process.send(signal.SIGKILL)
        process.wait()
    assert start(*given, cwd=killed).wait() == 0
    assert results(killed / "run") == results(undisturbed / "run")
    assert sorted(ids(killed / "run")) == sorted(ids(undisturbed / "run"))


def test_one_process_holds_a_run(start: Forks, whole: Path, tmp_path: Path) -> None:
    first = start(*CHOICE, cwd=tmp_path)
    assert first.until_lines(tmp_path / "run/samples.jsonl", 3)
    first.send(signal.SIGSTOP)
    before = (tmp_path / "run/samples.jsonl").read_bytes()
    second = start(*CHOICE[:-1], "../run", cwd=beside(tmp_path, "elsewhere"))
    assert second.wait() == 2
    assert (
        second.err.read_text()
        == "error: ../run is in use by another process; wait for it, or choose another --output\n"
    )
    assert second.out.read_text() == ""
    assert (tmp_path / "run/samples.jsonl").read_bytes() == before
    first.send(signal.SIGCONT)
    assert first.wait() == 0
    assert results(tmp_path / "run") == results(whole)


def test_interrupted(start: Forks, whole: Path, tmp_path: Path) -> None:
    process = start(*CHOICE, cwd=tmp_path)
    assert process.until_lines(tmp_path / "run/samples.jsonl", 5)
    process.send(signal.SIGINT)
    assert seconds_to_end(process.pid) < 2
    assert process.wait() == 1
    assert process.out.read_text() == ""
    said = "error: interrupted; what was done is kept, and the same command goes on from there\n"
    assert process.err.read_text() == said
    kept = ids(tmp_path / "run")
    assert 5 <= len(kept) < 24
    process = start(*CHOICE, cwd=tmp_path)
    assert (process.wait(), process.err.read_text()) == (0, "")
    timing = json.loads((tmp_path / "run/results.json").read_text())["timing"]
    assert timing["samples_computed_now"] == 24 - len(kept)
    assert set(kept) < set(ids(tmp_path / "run"))
    assert results(tmp_path / "run") == results(whole)


def test_streams(start: Forks, tmp_path: Path) -> None:
    """Stdout holds the result and nothing else, wherever it goes; a terminal sees the progress on stderr."""
    given = ["hhh", "--limit", 2, "--output", "run", "--json"]
    master, slave = os.openpty()
    process = start(*given, cwd=tmp_path, err=os.ttyname(slave))
    assert process.wait() == 0
    seen = os.read(master, 1 << 16).decode()
    os.close(master)
    os.close(slave)
    assert "hhh choice" in seen
    assert "8/8" in seen
    assert json.loads(process.out.read_text()) == json.loads((tmp_path / "run/results.json").read_text())
    process = start(*given, cwd=tmp_path)
    assert (process.wait(), process.err.read_text()) == (0, "")


@pytest.mark.parametrize("shown", ["", "--json"])
def test_a_reader_that_has_gone(shown: str, start: Forks, whole: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    binary = Path(sys.executable).with_name("almost-eval")
    with fifo.open("w") as writer:
        os.close(reader)  # before a word is written, as `| head -0` may
        done = subprocess.run(
            [binary, "report", whole, *filter(None, [shown])], stdout=writer, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == ""


# --- with a scripted model


class Scripted(ScriptedEngine):
    """The public test double, with what a spec asks of a model."""

    loaded = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.checkpoint = SimpleNamespace(name="scripted", architecture="", weight_digest=lambda: "0")

    def settings(self) -> dict[str, Any]:
        return {"name": "scripted", "dtype": "float32", "device": "cpu", "context_length": self.context_length}

    def stream(self, *arguments: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        self.loaded += 1
        return super().stream(*arguments, **options)


class Colours(Task):
    """Six questions with the answers red and blue; red is right. Shots are words."""

    name = "colours"
    protocol = "choice"
    max_shots = 2

    def __init__(self, n: int = 6, requires: Any = "loglikelihood") -> None:
        self.n = n
        self.requires = requires
        self.data = DataSource("nano", None)
        self.prompting = Prompting()

    def samples(self) -> list[Sample]:
        return [Sample(f"{i}", (Message("user", f"q{i}"),), ("red", "blue"), 0, f"{i}") for i in range(self.n)]

    def requests(self, sample: Sample, shots: int) -> list[LoglikelihoodRequest]:
        return [LoglikelihoodRequest("shot " * shots + f"q{sample.id}", (" red", " blue"))]

    def generation(self, sample: Sample, shots: int) -> GenerationRequest:
        return GenerationRequest("shot " * shots + f"q{sample.id}", SamplingParams(max_new_tokens=3))

    def score(self, sample: Sample, outputs: Outputs) -> Score:
        if "completions" in outputs:
            return Score(float("red" in outputs["completions"][0]))
        score = choice_score(outputs["loglikelihoods"][0], sample.gold)
        return Score(score.value, score.reason, {"accuracy": score.value})

    def metrics(self, records: Sequence[SampleRecord]) -> dict[str, Metric]:
        known = [r.score.value for r in records if r.score.value is not None]
        mean = sum(known) / len(known) if known else None
        return {"accuracy": Metric(mean, None, None, len(known), len(records) - len(known))}

    def settings(self) -> dict[str, Any]:
        return {"limit": None}

    def data_fingerprint(self) -> str:
        return "colours"


def red(context: str, continuation: str) -> float:
    return -1.0 if continuation == " red" else -2.0


def test_the_loop_by_hand(tmp_path: Path) -> None:
    engine = Scripted(red)
    found, validity = Run(Colours(), engine).execute(tmp_path / "run")
    assert found["metrics"]["accuracy"] == {"value": 1.0, "stderr": None, "ci95": None, "n": 6, "unscored": 0}
    assert validity.passed
    assert found["timing"]["samples_computed_now"] == 6
    assert json.loads((tmp_path / "run/results.json").read_text()) == found
    first = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    assert first["outputs"] == {"loglikelihoods": [[-1.0, -2.0]], "is_greedy": [[True, False]], "n_tokens": [[1, 1]]}


def test_a_finished_run_asks_nothing(tmp_path: Path) -> None:
    before, _ = Run(Colours(), Scripted(red)).execute(tmp_path / "run")
    engine = Scripted(red)
    after, _ = Run(Colours(), engine).execute(tmp_path / "run")
    assert engine.loaded == 0
    assert after == before


def test_a_finished_run_is_judged_anew_by_other_shares(tmp_path: Path) -> None:
    engine = Scripted(lambda context, text: math.nan if context.endswith("q3") else red(context, text))
    found, validity = Run(Colours(), engine).execute(tmp_path / "run")
    assert not validity.passed
    assert found["metrics"]["accuracy"]["value"] is None
    assert found["metrics"]["accuracy"]["withheld"].startswith(
        "1 of 6 samples have a score that is not a finite number"
    )
    shares = {**dict.fromkeys(found["validity"]["checks"], 0.0), "non_finite": 0.5}
    found, validity = Run(Colours(), engine, allowed=shares).execute(tmp_path / "run")
    assert validity.passed
    assert found["metrics"]["accuracy"]["value"] == 1.0
    assert "withheld" not in found["metrics"]["accuracy"]


def test_shots_are_dropped_before_a_sample_is_given_up(tmp_path: Path) -> None:
    # Contexts of 3 words (two shots, the question), one of them 2 words longer; a continuation of 1 word.
    class Long(Colours):
        def requests(self, sample: Sample, shots: int) -> list[LoglikelihoodRequest]:
            more = "and so " * (sample.id == "1") + "on and on " * (sample.id == "2")
            return [LoglikelihoodRequest("shot " * shots + more + f"q{sample.id}", (" red", " blue"))]

    found, _ = Run(Long(), Scripted(red, context_length=3)).execute(tmp_path / "run")
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())}
    assert [lines[str(i)]["prompt_tokens_truncated"] for i in range(3)] == [0, 2, 0]
    assert (lines["2"]["score"], lines["2"]["reason"], lines["2"]["outputs"]) == (None, "context_too_long", {})
    assert found["validity"]["checks"]["truncated"]["count"] == 2


def test_generation_drops_shots_too(tmp_path: Path) -> None:
    def complete(prompt: str) -> str:
        return f"red after {len(prompt.split())}"

    class Long(Colours):
        def generation(self, sample: Sample, shots: int) -> GenerationRequest:
            more = "on and on and on " * (sample.id == "2")
            return GenerationRequest("shot " * shots + more + f"q{sample.id}", SamplingParams(max_new_tokens=3))

    engine = Scripted(red, complete=complete, context_length=5)
    found, _ = Run(Long(requires="generation"), engine).execute(tmp_path / "run")
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())}
    # Two shots and the question are 3 words, 3 new ones make 6: one shot too many for 5, and none for 6.
    assert lines["0"]["outputs"]["completions"] == ["red after 2"]
    assert lines["0"]["prompt_tokens_truncated"] == 1
    assert (lines["2"]["reason"], lines["2"]["outputs"]) == ("context_too_long", {})
    assert found["metrics"]["accuracy"] == {"value": None, "stderr": None, "ci95": None, "n": 5, "unscored": 1} | {
        "withheld": "6 of 6 samples have a prompt that does not fit as a whole (allowed 1.0%)"
    }
    roomy = Scripted(red, complete=complete, context_length=6)
    results, _ = Run(Long(requires="generation"), roomy).execute(tmp_path / "roomy")
    assert results["validity"]["checks"]["truncated"]["count"] == 1  # number 2 alone
    with pytest.raises(InputError, match="no prompt leaves room for 3 new tokens in the context of 3 of "):
        Run(Long(requires="generation"), Scripted(red, complete=complete, context_length=3))


def test_the_seed_reaches_what_is_drawn(tmp_path: Path) -> None:
    engine = Scripted(red, complete=lambda _: "red")
    seeds = []

    def stream_completions(prompts: Sequence[str], params: SamplingParams) -> Any:
        seeds.append(params.seed)
        return ScriptedEngine.stream_completions(engine, prompts, params)

    engine.stream_completions = stream_completions  # type: ignore[method-assign]
    Run(Colours(2, requires="generation"), engine, seed=7).execute(tmp_path / "run")
    assert seeds == [7]  # both prompts in one call


def test_stopped_by_an_error_and_resumed(tmp_path: Path) -> None:
    class Breaks(Colours):
        def score(self, sample: Sample, outputs: Outputs) -> Score:
            if sample.id == "4":
                raise RunError("the lights went out")
            return super().score(sample, outputs)

    with pytest.raises(RunError, match="lights"):
        Run(Breaks(), Scripted(red)).execute(tmp_path / "run")
    assert ids(tmp_path / "run") == ["0", "1", "2", "3"]
    found, _ = Run(Colours(), Scripted(red)).execute(tmp_path / "run")
    assert found["timing"]["samples_computed_now"] == 2
    whole, _ = Run(Colours(), Scripted(red)).execute(tmp_path / "whole")
    assert found | {"timing": None} == whole | {"timing": None}


def test_another_commit_on_the_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Colours):
        def score(self, sample: Sample, outputs: Outputs) -> Score:
            raise RunError("stop")

    monkeypatch.setattr("almost_eval.run.provenance.commit", lambda: "aaa")
    with pytest.raises(RunError):
        Run(Breaks(), Scripted(red)).execute(tmp_path / "run")
    monkeypatch.setattr("almost_eval.run.provenance.commit", lambda: "bbb")
    found, _ = Run(Colours(), Scripted(red)).execute(tmp_path / "run")
    assert found["engine"]["warnings"] == ["begun on commit aaa, ended on bbb"]
    assert found["provenance"]["commit"] == "aaa"


def test_another_run_in_the_folder(tmp_path: Path) -> None:
    Run(Colours(), Scripted(red)).execute(tmp_path / "run")
    with pytest.raises(
        StoreError, match=r"holds another run: n_samples was 6, is 7; seed was 0, is 1; prompt_ids_digest"
    ):
        Run(Colours(7), Scripted(red), seed=1).execute(tmp_path / "run")


def test_a_task_without_samples() -> None:
    with pytest.raises(InputError, match="colours has no samples"):
        Run(Colours(0), Scripted(red))


def test_ids_are_unique() -> None:
    class Twice(Colours):
        def samples(self) -> list[Sample]:
            return super().samples() * 2

    with pytest.raises(InputError, match="6 samples with an id that is not unique"):
        Run(Twice(), Scripted(red))
