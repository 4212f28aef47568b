"""Workers answer as one process does, in every bit, while one of them is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions, generation_engine, loglikelihood_engine
from almost_eval.errors import InputError, RunError
from almost_eval.files import read_json
from almost_eval.progress import Progress
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.types import LoglikelihoodRequest

CPU = EngineOptions(device="cpu", dtype="float32")
FOUR = EngineOptions(device="cpu", dtype="float32", workers=4)
# One sequence in a pass: a worker that is killed at the fifth sample is then in the middle of its work.
CPU_STEPWISE = EngineOptions(device="cpu", dtype="float32", batch_size=1)
FOUR_STEPWISE = EngineOptions(device="cpu", dtype="float32", batch_size=1, workers=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each of the workers has: with others the last bits of a sum differ."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workers() -> list[psutil.Process]:
    """The workers of this process: children of the process that forks them."""
    return [worker for child in psutil.Process().children() for worker in child.children()]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    before = {process.pid for process in workers()}
    yield
    assert {process.pid for process in workers()} <= before


class KillAt(Progress):
    """Kills workers as the so many-th sample is done: the one that has worked most, and is at work; or all, always."""

    def __init__(self, samples: int, *, all_of_them: bool = False) -> None:
        self.killed: list[int] = []
        self.bars: list[str] = []
        self._left = samples
        self._all = all_of_them
        self._of_others = {process.pid for process in workers()}

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """One bar."""
        self.bars.append(description)

        def advance(count: int = 1) -> None:
            self._left -= count
            if self._left == 0 or (self._left < 0 and self._all):
                mine = [worker for worker in workers() if worker.pid not in self._of_others]
                alive = [worker for worker in mine if worker.status() != psutil.STATUS_ZOMBIE]
                for worker in alive if self._all else [max(alive, key=lambda one: sum(one.cpu_times()[:2]))]:
                    self.killed.append(worker.pid)
                    worker.kill()

        yield advance


def execute(request: RunRequest, folder: Path, progress: Progress | None = None) -> tuple[dict[str, Any], list[str]]:
    """results.json, and the sorted lines of samples.jsonl."""
    run = open_run(request)
    run.execute(folder, progress)
    return read_json(folder / "results.json"), sorted((folder / "samples.jsonl").read_text().splitlines())


def compare_with_one_killed(task: str, protocol: str, model: str, tmp_path: Path, **more: Any) -> None:
    alone, lines = execute(
        RunRequest(task=task, protocol=protocol, model=model, engine=CPU_STEPWISE, **more), tmp_path / "one"
    )
    progress = KillAt(5)
    request = RunRequest(task=task, protocol=protocol, model=model, engine=FOUR_STEPWISE, **more)
    shared, shared_lines = execute(request, tmp_path / "four", progress)
    assert len(progress.killed) == 1
    assert len(progress.bars) == 1
    assert shared_lines == lines
    pool = shared.pop("timing")["workers"]
    assert (pool["transport"], pool["workers"], len(pool["lost"])) == ("local", 4, 1)
    (warning,) = set(shared["engine"]["warnings"]) - set(alone["engine"]["warnings"])
    assert warning.startswith("1 worker of 4 ended early, and the others took over (worker ")
    assert "SIGKILL" in warning
    shared["engine"]["warnings"].remove(warning)
    del alone["timing"]
    assert shared == alone
    specs = [read_json(tmp_path / name / "spec.json") for name in ("one", "four")]
    assert specs[0] == specs[1]


def test_four_workers_on_two_cores_one_of_them_killed(tmp_path: Path) -> None:
    compare_with_one_killed("hhh", "choice", "nano/almost", tmp_path)


def test_batches_of_many_are_those_of_one_process(tmp_path: Path) -> None:
    alone, lines = execute(RunRequest(task="hhh", model="nano/almost", engine=CPU), tmp_path / "one")
    shared, shared_lines = execute(RunRequest(task="hhh", model="nano/almost", engine=FOUR), tmp_path / "four")
    assert shared_lines == lines
    del alone["timing"], shared["timing"]
    assert shared == alone


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "model"), [("likelihood", "nano/sft"), ("reward", "nano/reward")])
def test_the_other_protocols_too(protocol: str, model: str, tmp_path: Path) -> None:
    compare_with_one_killed("hhh", protocol, model, tmp_path)


@pytest.mark.slow
def test_all_killed_is_one_line_and_the_same_run_goes_on(tmp_path: Path) -> None:
    request = RunRequest(task="hhh", protocol="choice", model="nano/almost", engine=FOUR_STEPWISE)
    run = open_run(request)
    with pytest.raises(RunError, match=r"(all 4 workers have ended|workers ended over the same).*same command goes on"):
        run.execute(tmp_path / "run", KillAt(5, all_of_them=True))
    kept = (tmp_path / "run" / "samples.jsonl").read_text().count("\n")
    assert kept >= 5
    assert not (tmp_path / "run" / "results.json").exists()
    results, lines = execute(request, tmp_path / "run")
    assert results["timing"]["samples_computed_now"] == len(lines) - kept
    alone, lines_alone = execute(RunRequest(task="hhh", model="nano/almost", engine=CPU_STEPWISE), tmp_path / "one")
    assert lines == lines_alone
    assert results["metrics"] == alone["metrics"]


@pytest.mark.slow
def test_texts_are_those_of_one_process() -> None:
    prompts = [
        f"Human: What is {word}?\n\nAssistant:" for word in "a panther|Mars|tea|a violin|rain|the sea".split("|")
    ]
    params = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.9, n=2, seed=3)
    alone = generation_engine("nano/almost", CPU).generate(prompts, params)
    engine: Any = generation_engine("nano/almost", FOUR)
    assert engine.generate(prompts, params) == alone
    assert engine.report.path == "generate"
    assert [c for _, c in sorted(engine.stream_completions(prompts[:1], params))] == alone[:1]
    engine.close()


@pytest.mark.slow
def test_a_worker_is_killed_while_texts_are_written() -> None:
    prompts = [f"Human: What is number {number}?\n\nAssistant:" for number in range(24)]
    params = SamplingParams(max_new_tokens=24, temperature=0.8, top_p=0.9, seed=3)
    alone = generation_engine("nano/almost", CPU_STEPWISE).generate(prompts, params)
    engine: Any = generation_engine("nano/almost", FOUR_STEPWISE)
    kill, texts = KillAt(1), {}
    with kill.track("texts", len(prompts)) as advance:
        for index, completions in engine.stream_completions(prompts, params):
            assert index not in texts
            texts[index] = completions
            advance()
    assert len(kill.killed) == len(engine.pool.lost) == 1
    assert [texts[index] for index in range(len(prompts))] == alone
    engine.close()


@pytest.mark.slow
def test_half_precision_is_measured_once(tmp_path: Path) -> None:
    one = RunRequest(task="hhh", model="nano/almost", engine=EngineOptions(device="cpu", dtype="bfloat16"))
    many = RunRequest(task="hhh", model="nano/almost", engine=EngineOptions(device="cpu", dtype="bfloat16", workers=2))
    alone, lines = execute(one, tmp_path / "one")
    shared, shared_lines = execute(many, tmp_path / "two")
    assert shared["engine"] == alone["engine"]  # its rounding too
    assert shared_lines == lines


def test_what_cannot_be_shared_is_refused_before_a_model_is_looked_for() -> None:
    for options in (EngineOptions("openai", workers=2), EngineOptions("openai", ray="local")):
        with pytest.raises(InputError, match=r"'openai' takes no (workers|ray): .*repeat --base-url"):
            loglikelihood_engine("no-model", options)


def test_a_wrong_number_is_refused_and_no_weights_are_loaded_here() -> None:
    with pytest.raises(InputError, match="--worker-timeout is of workers: name them with --workers or --ray"):
        loglikelihood_engine("nano/almost", EngineOptions(worker_timeout=60, device="cpu"))
    with pytest.raises(InputError, match="--workers 0: give a number of at least 1, or GPUS"):
        loglikelihood_engine("nano/almost", EngineOptions(workers="0", device="cpu"))
    before = workers()
    engine: Any = loglikelihood_engine("nano/almost", FOUR)
    one: Any = loglikelihood_engine("nano/almost", CPU)
    assert engine.settings() == one.settings()  # so the spec is one process's
    assert "model" not in vars(engine.reader)
    assert workers() == before
    with pytest.raises(InputError, match="do not fit the context"):
        engine.generate(["Human: hello"], SamplingParams(max_new_tokens=10**6))


@pytest.mark.real
def test_a_real_model_in_two_workers_is_the_same_in_every_bit(real_models: Any) -> None:
    subjects = ("bread", "rain", "a cat's purr", "the first bicycle", "tea", "the sea")
    requests = [
        LoglikelihoodRequest(f"Question: What is {subject} made of?\nAnswer:", (" water", " flour", " I do not know"))
        for subject in subjects
    ]
    prompts = [request.context for request in requests]
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=1)
    one: Any = loglikelihood_engine(str(real_models.smollm2), CPU)
    two: Any = loglikelihood_engine(str(real_models.smollm2), EngineOptions(device="cpu", dtype="float32", workers=2))
    assert two.loglikelihood(requests) == one.loglikelihood(requests)
    assert two.generate(prompts, params) == one.generate(prompts, params)
    assert two.report.warnings == []
