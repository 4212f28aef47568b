"""Summary of a pipeline: the table of stages for the terminal, and one picture of reward, KL and judgement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.files import read_rows
from almost_eval.types import JSONObject
from almost_train.pipeline.run import StageReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


def stage_table(reports: Sequence[StageReport]) -> Table:
    """A rich table: stage, what was done, seconds, and its figure."""
    from rich.table import Table

    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    table.add_column("state")
    table.add_column("seconds", justify="right")
    table.add_column("outcome", overflow="fold")
    for report in reports:
        state = f"{report.state} ({report.note})" if report.note else report.state
        table.add_row(report.name, state, f"{report.seconds:.0f}", outcome(report.name, report.result["metrics"]))
    return table


_ROWS = {
    "reward": "reward",
    "oracle": "oracle",
    "oracle/helpful": "helpful",
    "oracle/honest": "honest",
    "oracle/harmless": "harmless",
    "kl": "KL, nats",
    "characters": "length",
    "finished": "ended",
    "cut": "cut at the limit of new tokens",
}
"""Metric of `evaluation` -> its heading."""


def policy_table(metrics: Mapping[str, JSONObject]) -> Table:
    """A rich table of the evaluation: a column for each policy, a row for each metric, with 95 % intervals.

    Below it: answers that a metric could not measure, and why a mean is withheld.
    """
    from rich.table import Table
    from rich.text import Text

    title = "Policies on held-out prompts, 95 % intervals"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    for policy in metrics:
        table.add_column(Text(policy), justify="right", no_wrap=True)
    notes = []
    for name, heading in _ROWS.items():
        if any(name in by_name for by_name in metrics.values()):
            table.add_row(heading, *(_with_interval(by_name.get(name)) for by_name in metrics.values()))
            notes += [f"{policy}, {heading}: {note}" for policy, of in metrics.items() if (note := _note(name, of))]
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def _note(name: str, metrics: JSONObject) -> str:
    """What a figure leaves out; empty where it leaves nothing out."""
    metric = metrics.get(name, {})
    if reason := metric.get("withheld"):
        return f"withheld, as {reason}"
    if not metric.get("unscored") or "/" in name:  # a query has one dimension
        return ""
    return f"{metric['unscored']} of {metric['n'] + metric['unscored']} not measured"


def outcome(stage: str, metrics: JSONObject) -> str:
    """The figure of a stage that a reader looks for first."""
    try:
        return _OUTCOMES[stage](metrics)
    except (KeyError, TypeError):  # a result of an older version: the table must not fail for it
        return ""


def _with_interval(metric: JSONObject | None) -> str:
    if metric is None or metric["value"] is None:
        return "withheld" if metric and metric.get("withheld") else "-"
    if isinstance(metric["value"], int):  # a count
        return str(metric["value"])
    half = f"±{(metric['ci95'][1] - metric['ci95'][0]) / 2:.2f}" if metric["ci95"] else ""
    return f"{metric['value']:.2f}{half}"


def _held_out(metrics: JSONObject) -> str:
    held_out = metrics["eval"]
    if not held_out or not held_out["pairs"]:
        return f"{metrics['train_pairs']} pairs, none held out"
    accuracy, shorter, longer_wins = (
        held_out[name]["value"] for name in ("accuracy", "accuracy_chosen_shorter", "longer_wins")
    )
    return (
        f"{metrics['train_pairs']} pairs; held-out accuracy {accuracy:.3f}, where the chosen is shorter {shorter:.3f}, "
        f"longer wins {longer_wins:.3f}"
    )


def _held_out_pairs(metrics: JSONObject) -> str:
    held_out = metrics.get("held_out")
    return f"; held-out accuracy {held_out['accuracy']:.3f}" if held_out else ""


def _cut(texts: str, *counts: int) -> str:
    return f", {sum(counts)} {texts} cut at the limit of new tokens" if sum(counts) else ""


_OUTCOMES: dict[str, Callable[[JSONObject], str]] = {
    "prompts": lambda m: f"{m['prompts']} prompts of {m['candidates']} candidates",
    "responses": lambda m: (
        ", ".join(f"{name} {c['kept']}" for name, c in m["configurations"].items())
        + " kept"
        + _cut("responses", *(c["cut_by_budget"] for c in m["configurations"].values()))
    ),
    "votes": lambda m: f"{m['pairs']} pairs",
    "as_is_reward": _held_out,
    "comparisons": lambda m: f"{m['comparisons']} pairs, chosen longer in {m['chosen_longer']:.0%}",
    "reward": _held_out,
    "self_play": lambda m: (
        f"{m['demonstrations']} dialogues, {sum(m['rejected'].values())} rejected, mean reward of the "
        f"chosen {m['reward']['chosen']:.2f}, of all {m['reward']['all_valid']:.2f}"
        + "".join(_cut(name.replace("_", " "), count) for name, count in m.get("cut_by_budget", {}).items())
    ),
    "sft": lambda m: f"{m['answers']} answers, {m['steps']} steps",
    "rlsf": lambda m: f"{m['algorithm']}" + (f", stopped: {m['stopped']}" if m["stopped"] else ""),
    "dpo": lambda m: f"{m['train_pairs']} pairs, {m['steps']} steps" + _held_out_pairs(m),
    "online_dpo": lambda m: (
        f"{m['prompts']} prompts, {m['steps']} steps, KL {m['kl_last']:.2f} nats, mean reward {m['reward_last']:.2f}"
    ),
    "evaluation": lambda m: "see below",
}


def draw(folder: Path, reports: Sequence[StageReport]) -> Path | None:
    """`summary.png`: reward and KL over RLSF's steps, and each policy's reward and judgement; None with neither."""
    results = {report.name: report.result["metrics"] for report in reports}
    log = folder / "rlsf" / "log.jsonl"
    steps = read_rows(log) if "rlsf" in results and log.exists() else []
    policies = results.get("evaluation", {})
    panels = [bool(steps), bool(policies)]
    if not any(panels):
        return None
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, sum(panels), figsize=(5.2 * sum(panels), 3.6), squeeze=False)
    places = iter(axes[0])
    if steps:
        _draw_steps(next(places), steps)
    if policies:
        _draw_policies(next(places), policies)
    figure.tight_layout()
    file = folder / "summary.png"
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return file


def _draw_steps(axis: Axes, steps: Sequence[JSONObject]) -> None:
    x = [row["step"] for row in steps]
    axis.plot(x, [row["reward"] for row in steps], color="tab:blue", label="reward (raw logit)")
    axis.set_xlabel("RLSF step")
    axis.set_ylabel("mean reward", color="tab:blue")
    right = axis.twinx()
    right.plot(x, [row["kl"] for row in steps], color="tab:orange", label="KL")
    right.set_ylabel("KL to the SFT policy, nats an answer", color="tab:orange")
    axis.set_title("RLSF")


def _draw_policies(axis: Axes, policies: Mapping[str, JSONObject]) -> None:
    """Reward on the left axis; what ranges from 0 to 1 on the right."""
    names = list(policies)
    places = range(len(names))
    judged = "oracle" if any("oracle" in policies[name] for name in names) else None

    def bars(on: Axes, metric: str, shift: float, colour: str) -> None:
        # What could not be measured has no bar.
        values = [math.nan if (v := policies[name][metric]["value"]) is None else v for name in names]
        spans = [policies[name][metric]["ci95"] or (value, value) for name, value in zip(names, values, strict=True)]
        error = [
            [v - lo for v, (lo, _) in zip(values, spans, strict=True)],
            [hi - v for v, (_, hi) in zip(values, spans, strict=True)],
        ]
        on.bar([place + shift for place in places], values, 0.36, yerr=error, capsize=3, color=colour)

    bars(axis, "reward", -0.2 if judged else 0, "tab:blue")
    axis.set_ylabel("mean reward", color="tab:blue")
    axis.set_xticks(list(places), names)
    if judged:
        right = axis.twinx()
        bars(right, judged, 0.2, "tab:green")
        right.set_ylim(0, 1)
        right.set_ylabel("oracle score, 0 to 1", color="tab:green")
    axis.set_title("Policies on held-out prompts (95 %)")
