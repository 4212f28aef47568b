"""The score of a group of lm-eval tasks, as lm-eval defines it.

lm-eval's `Group.aggregate` itself is called on our members' scores, so which members count, which of their filters, and
whether a member weighs by its size is what the group's file says. A group may hold groups; each is aggregated over its
tasks, not over its groups' scores. A group without a list of metrics has no score, and a tag is no group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from almost_eval.stats import mean_metric, mean_of_means
from almost_eval.types import Metric, SampleRecord


class LmEvalTasks(dict[str, Any]):
    """lm-eval's task objects by name, with the groups that hold them."""

    def __init__(self, tasks: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
        super().__init__(tasks)
        self.groups = dict(groups)
        """lm-eval's group objects by name, those inside others too."""


def metric_key(name: str, metric: str, filter_name: str, filters: int) -> str:
    """Name of a metric; the filter is part of it where there are several."""
    return f"{name}/{metric},{filter_name}" if filters > 1 else f"{name}/{metric}"


def task_key(name: str, task: Any, metric: str, filter_name: str) -> str:
    """The same of a task's metric."""
    return metric_key(name, metric, filter_name, len(task._filters))


def group_headline(group: Any) -> str | None:
    """The first metric of a group, or of the first group in it that has one; None where none has."""
    for candidate in (group, *group.get_all_groups()):
        filters = _filters(candidate)
        for metric in candidate.aggregate_metric_list or ():
            if chosen := filters.get(metric.metric):
                return metric_key(candidate.name, metric.metric, chosen[0], len(chosen))
    return None


def group_metrics(
    groups: Mapping[str, Any], tasks: Mapping[str, Any], metrics: Mapping[str, Metric], records: Sequence[SampleRecord]
) -> dict[str, Metric]:
    """`<group>/<metric>` of each group that has a score: lm-eval's value, with an interval by cluster.

    `groups` and `tasks` are lm-eval's objects by name, `metrics` and `records` those of the tasks.
    """
    members = {name: _as_lm_eval(name, task, metrics) for name, task in tasks.items()}
    scores: dict[str, Metric] = {}
    for group in groups.values():
        result = group.aggregate(members)
        filters = _filters(group)
        names = [task.task_name for task in group.get_all_tasks()]
        for entry in group.aggregate_metric_list or ():
            for chosen in filters.get(entry.metric, ()):
                mine = {
                    name: task_key(name, tasks[name], entry.metric, chosen)
                    for name in names
                    if _has(tasks[name], entry.metric, chosen)
                }
                value = result.get(f"{entry.metric},{chosen}")
                # lm-eval leaves out a member without a value; a group's score is of all members, or it is none.
                if any(metrics[key].value is None for key in mine.values()):
                    value = None
                spread = _spread(mine, tasks, entry, records)
                n, unscored = (sum(getattr(metrics[key], of) for key in mine.values()) for of in ("n", "unscored"))
                scores[metric_key(group.name, entry.metric, chosen, len(filters[entry.metric]))] = replace(
                    spread if value is not None else Metric(None, None, None, 0), value=value, n=n, unscored=unscored
                )
    return scores


def _as_lm_eval(name: str, task: Any, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """A task's scores in the form of lm-eval's results."""
    scores: dict[str, Any] = {}
    size = 0
    for pipeline in task._filters:
        for metric in task.aggregation():
            mine = metrics[task_key(name, task, metric, pipeline.name)]
            size = max(size, mine.n)  # lm-eval weighs by the metric that most documents have
            if mine.value is not None:
                scores[f"{metric},{pipeline.name}"] = mine.value
    return {"sample_len": size, **scores}


def _filters(group: Any) -> dict[str, list[str]]:
    """Metric -> the filters under which a group aggregates it: those that it names, or all of its tasks', by name."""
    filters: dict[str, list[str]] = {}
    tasks = group.get_all_tasks()
    for entry in group.aggregate_metric_list or ():
        of_tasks = {p.name for task in tasks for p in task._filters if entry.metric in task.aggregation()}
        names = sorted(of_tasks) if entry.filter_list is None else [f for f in entry.filter_list if f in of_tasks]
        if names:
            filters[entry.metric] = names
    return filters


def _has(task: Any, metric: str, filter_name: str) -> bool:
    return metric in task.aggregation() and filter_name in {pipeline.name for pipeline in task._filters}


def _spread(keys: Mapping[str, str], tasks: Mapping[str, Any], entry: Any, records: Sequence[SampleRecord]) -> Metric:
    """Standard error and interval of a group's score; none where a member's score is no mean of its documents."""
    if any(getattr(tasks[name].aggregation()[entry.metric], "__name__", "") != "mean" for name in keys):
        return Metric(None, None, None, 0)
    mine = [r for r in records if r.sample.group in keys]
    if entry.weight_by_size:
        return mean_metric([_value(r, keys) for r in mine], [r.sample.cluster for r in mine])
    return mean_of_means({name: [_value(r, keys) for r in mine if r.sample.group == name] for name in keys})


def _value(record: SampleRecord, keys: Mapping[str, str]) -> float | None:
    return record.score.metrics.get(keys[record.sample.group])
