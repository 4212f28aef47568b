"""What a pilot times: the path of the whole run, and nothing that a run does once as often as it has stretches."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines import hf_rounding
from almost_eval.engines.build import EngineOptions
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.pooled import EngineServant, Scoring
from almost_eval.nano.seeded import build_checkpoint
from almost_eval.progress import Progress
from almost_eval.run.runner import RunRequest
from almost_eval.suite import pilot as pilots
from almost_eval.suite.pilot import Pilot
from almost_eval.suite.plan import Planned, SuiteRequest, plan
from almost_eval.workers.work import Unit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("pilot") / "model", hidden_size=32, layers=1)


def planned(
    checkpoint: Path, dtype: str = "float32", workers: int | None = None, **changed: Any
) -> tuple[Planned, Any]:
    """HHH on nano's pairs, planned, and its run, on a copy of the checkpoint with `changed` in its config."""
    copy = Path(tempfile.mkdtemp(dir=checkpoint.parent)) / "model"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changed}))
    engine = EngineOptions(dtype=dtype, device="cpu", workers=workers)
    base = RunRequest(task="", model=str(copy), data="nano", template="none", engine=engine)
    (one,), _ = plan(["hhh-choice"], SuiteRequest(base=base))
    return one, one.run


def a_second_a_token(
    chosen: Sequence[Sequence[int]], read: Any, size: Any, real: Any = pilots._seconds_a_token
) -> float:
    """Reads what a pilot reads."""
    assert real(chosen, read, size) > 0
    return 1.0


def test_a_window_of_the_run_is_tried_once_and_before_the_clock_runs(checkpoint: Path, tmp_path: Path) -> None:
    """Gemma 3 was tried in a timed stretch, as the first of them that was longer than the window came up there."""
    from almost_eval.engines.hf_loglikelihood import AttentionWindow

    one, run = planned(checkpoint)
    longest = max(request.n_positions for request in run.prepared.requests)
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": longest - 1}
    one, run = planned(checkpoint, **mistral)  # one request alone is longer
    pilot = Pilot(Progress())
    assert one.read > pilots.TOKENS  # so not all is timed
    assert pilot.seconds(one)
    assert set(run.model.probes) == {AttentionWindow.of(run.model.model.config, longest)}
    run.execute(tmp_path)
    assert len(run.model.probes) == 1


def test_each_task_tries_its_windows_before_its_clock_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model for all tasks: the second has longer requests than the first."""
    one, run = planned(checkpoint, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    pilot = Pilot(Progress())
    run.prepared.requests, whole = [min(run.prepared.requests, key=lambda r: r.n_positions)], run.prepared.requests
    assert pilot.seconds(one)
    run.prepared.requests = whole
    tried: list[int] = []

    def counted(*words: Any) -> float:
        tried.append(len(run.model.probes))
        return a_second_a_token(*words)

    monkeypatch.setattr(pilots, "_seconds_a_token", counted)
    assert pilot.seconds(one)
    assert tried == [len(run.model.probes)]


def test_a_path_that_shares_no_prefix_is_counted_as_it_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilots, "_seconds_a_token", a_second_a_token)
    one, run = planned(checkpoint, attention_window=64)  # a window that a model applies by itself
    seconds = Pilot(Progress()).seconds(one)
    results, _ = run.execute(tmp_path)
    assert results["engine"]["path"] == "plain"
    assert seconds == results["engine"]["tokens_computed"] > one.read


def test_rounding_is_measured_once_as_in_a_run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(
        model: Any, requests: Sequence[Any], *rest: Any, real: Any = hf_rounding.measure_rounding, **k: Any
    ) -> Any:
        measured.append(len(requests))
        return real(model, requests, *rest, **k)

    monkeypatch.setattr(hf_rounding, "measure_rounding", measure)
    one, run = planned(checkpoint, dtype="bfloat16")
    assert Pilot(Progress()).seconds(one)
    assert len(measured) == 1
    assert (run.model.part, run.model.longest) == (None, 0)


def test_workers_load_and_try_the_checkpoint_before_the_clock_runs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first finds out what the checkpoint can do, and the others are told; all are warm when the clock starts."""
    one, run = planned(checkpoint, workers=2)
    warm: list[tuple[int, set[Any]]] = []

    def counted(*words: Any) -> float:
        warm.append((len(run.model.pool._idle), set(pickle.loads(run.model._probes))))
        return a_second_a_token(*words)

    monkeypatch.setattr(pilots, "_seconds_a_token", counted)
    try:
        assert Pilot(Progress()).seconds(one) == one.read
        assert [n for n, _ in warm] == [2]
        assert warm[0][1] == set(pickle.loads(run.model._probes)) != set()
    finally:
        run.model.close()


def test_a_worker_that_is_told_tries_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = planned(checkpoint)
    task = Scoring(run.prepared.requests[:2], longest=run.prepared.requests[0].n_positions)
    first, second = (EngineServant(HFEngine(str(run.model.checkpoint.path), device="cpu")) for _ in range(2))
    answers = dict(first.answer(task, Unit(1, 0, (0, 1))))
    monkeypatch.setattr("almost_eval.engines.hf_probe.probe", None)  # whoever tries fails
    told = replace(task, probes=first.report().probes)
    assert dict(second.answer(told, Unit(1, 0, (0, 1)))) == answers
