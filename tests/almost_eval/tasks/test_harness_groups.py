"""The score of a group is lm-eval's own, to the last digit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_harness import SHAPES, make_task

from almost_eval.data.sources import DataSource
from almost_eval.engines.hf import HFEngine
from almost_eval.tasks import harness
from almost_eval.tasks.harness import Harness
from almost_eval.tasks.harness_groups import LmEvalTasks, group_headline
from almost_eval.types import SampleRecord

pytest_plugins = ["benchmark_fixtures"]

Ask = Callable[..., dict[str, SampleRecord]]
LmEval = Callable[..., tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]


def members() -> dict[str, Any]:
    """Tasks of 3, 7 and 16 documents, so that weighing by size makes a difference."""
    shapes = {"small": (3, "acc_norm"), "middle": (7, "random-shots"), "large": (16, "acc_norm")}
    return {name: make_task(name, process_docs=_first(size), **SHAPES[shape]) for name, (size, shape) in shapes.items()}


def _first(size: int) -> Callable[[Any], Any]:
    return lambda rows: rows.select(range(min(size, len(rows))))


def make_group(name: str, children: list[Any], *metrics: dict[str, Any]) -> Any:
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    config = GroupConfig(group=name, task=[], aggregate_metric_list=list(metrics) or None, metadata={"version": 3})
    group = Group.from_config(config)
    for child in children:
        group.add(child)
    return group


def nested() -> Any:
    """A group of a group and a task, a group without a score in it, and one with its own filters and weights."""
    tasks = members()
    inner = make_group("inner", [tasks["small"], tasks["middle"]], {"metric": "acc", "weight_by_size": False})
    silent = make_group("silent", [inner])
    return make_group(
        "outer",
        [silent, tasks["large"]],
        {"metric": "acc_norm", "weight_by_size": True},
        {"metric": "acc", "filter_list": "none", "weight_by_size": False},
        {"metric": "absent"},
    )


@pytest.fixture
def serve_group(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Harness]:
    def make(group: Any) -> Harness:
        groups = {group.name: group} | {inner.name: inner for inner in group.get_all_groups()}
        tasks = LmEvalTasks({task.task_name: task for task in group.get_all_tasks()}, groups)
        monkeypatch.setattr(harness, "load_lm_eval_tasks", lambda names, data: tasks)
        return Harness([group.name], DataSource("hub", None))

    return make


def test_nested_groups_equal_lm_eval(
    ask: Ask, lm_eval_samples: LmEval, serve_group: Callable[[Any], Harness], benchmark_checkpoint: Path
) -> None:
    _, theirs = lm_eval_samples(benchmark_checkpoint, [nested()])
    task = serve_group(nested())
    records = list(ask(task, HFEngine(str(benchmark_checkpoint), dtype="float32")).values())
    metrics = task.metrics(records)
    assert theirs["silent"].keys() <= {"alias", "name"}
    own = {key: metric.value for key, metric in metrics.items() if key.startswith(("outer/", "inner/"))}
    assert own == {
        "outer/acc_norm": theirs["outer"]["acc_norm,none"],
        "outer/acc": theirs["outer"]["acc,none"],
        "inner/acc": theirs["inner"]["acc,none"],
    }
    for name in ("small", "middle", "large"):
        assert metrics[f"{name}/acc"].value == theirs[name]["acc,none"]
    assert task.headline == next(iter(metrics)) == "outer/acc_norm"
    assert metrics["outer/acc"].n == 26
    assert metrics["inner/acc"].n == 10
    low, high = metrics["outer/acc"].ci95 or (1.0, 0.0)
    assert low < own["outer/acc"] < high  # type: ignore[operator]
    assert task.settings()["versions"]["outer"] == "3"
    assert json.dumps(task.settings())


def test_filters_of_a_group(
    ask: Ask, lm_eval_samples: LmEval, serve_group: Callable[[Any], Harness], benchmark_checkpoint: Path
) -> None:
    def group() -> Any:
        tasks = [make_task(name, process_docs=_first(n), **SHAPES["two-filters"]) for name, n in (("a", 3), ("b", 9))]
        return make_group(
            "both",
            [make_group("one", tasks, {"metric": "exact_match", "filter_list": ["any"]})],
            {"metric": "exact_match"},
        )

    _, theirs = lm_eval_samples(benchmark_checkpoint, [group()])
    task = serve_group(group())
    records = list(ask(task, HFEngine(str(benchmark_checkpoint), dtype="float32")).values())
    metrics = task.metrics(records)
    assert metrics["both/exact_match,any"].value == theirs["both"]["exact_match,any"]
    assert metrics["both/exact_match,strict"].value == theirs["both"]["exact_match,strict"]
    assert metrics["one/exact_match"].value == theirs["one"]["exact_match,any"]
    assert task.headline == "both/exact_match,any"


def test_a_group_without_a_score(serve_group: Callable[[Any], Harness]) -> None:
    tasks = list(members().values())
    task = serve_group(make_group("silent", tasks))
    assert task.headline == "small/acc"
    inner = make_group("inner", tasks[:2], {"metric": "acc"})
    assert group_headline(make_group("silent", [inner, tasks[2]])) == "inner/acc"
    assert group_headline(make_group("odd", tasks, {"metric": "absent"})) is None


def test_a_member_without_a_value_leaves_the_group_without_one(serve_group: Callable[[Any], Harness]) -> None:
    from almost_eval.types import Score

    task = serve_group(nested())
    records = [
        SampleRecord(
            s,
            {"loglikelihoods": []},
            Score(None, "non_finite")
            if s.group == "small"
            else Score(1.0, None, {f"{s.group}/acc": 1.0, f"{s.group}/acc_norm": 1.0}),
        )
        for s in task.samples()
    ]
    metrics = task.metrics(records)
    assert metrics["inner/acc"].value is None
    assert (metrics["inner/acc"].n, metrics["inner/acc"].unscored) == (7, 3)
    assert metrics["outer/acc_norm"].value is None
    assert metrics["large/acc"].value == 1.0


@pytest.mark.slow
def test_mmlu_stem_equals_lm_eval(
    ask: Ask, lm_eval_samples: LmEval, hub: DataSource, benchmark_checkpoint: Path
) -> None:
    _, theirs = lm_eval_samples(benchmark_checkpoint, ["mmlu_stem"], 0, 3)
    task = Harness(["mmlu_stem"], hub, shots=0, limit=3)
    records = list(ask(task, HFEngine(str(benchmark_checkpoint), dtype="float32")).values())
    metrics = task.metrics(records)
    assert task.headline == "mmlu_stem/acc"
    assert metrics["mmlu_stem/acc"].value == theirs["mmlu_stem"]["acc,none"]
