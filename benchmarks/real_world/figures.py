"""What the parts of a study say together: figures.json, the tables of figures.md, and page.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from almost_eval.compare.comparison import compare_runs
from almost_eval.compare.paired import paired_bootstrap
from almost_eval.files import Row, read_json, read_rows, write_json
from almost_eval.run.store import read_samples
from almost_eval.stats import mean_metric
from benchmarks.real_world.refusals import is_refusal
from benchmarks.real_world.study import Study
from benchmarks.real_world.variants import VARIANTS, folder_of

Table = tuple[str, str, list[str], list[list[str]]]
"""Title, a sentence below it, header, rows."""
BENCHMARKS = {
    "hhh-likelihood": ("accuracy",),
    "hhh-choice": ("accuracy",),
    "truthfulqa": ("mc1", "mc2", "mc1_true_prompt"),
    "mmlu": ("accuracy",),
    "mmlu-words": ("accuracy",),
}
"""Folder of a policy's run -> metrics that are shown."""
_FILTERS = [name for name, variant in VARIANTS.items() if variant.until == "reward"]
"""Variants that end with a reward model."""
SETS = {"hhh": "Static HHH", "people": "hh-rlhf harmless", "synthetic": "held-out synthetic"}


def write_figures(study: Study, form: str) -> str:
    """Write what is known so far; returns the tables as Markdown."""
    tables = [*reward_tables(study), *policy_tables(study), *answer_tables(study), *best_of_tables(study)]
    tables += [*label_tables(study), *filter_tables(study), *time_tables(study)]
    facts = {"recipe": study.recipe_name, "form": form, "seed": study.seed}
    write_json(study.folder / "figures.json", {**facts, "tables": [_as_json(table) for table in tables]})
    text = "\n".join(map(_markdown, tables))
    (study.folder / "figures.md").write_text(text, encoding="utf-8")
    title = f"ALMoST on real models: {study.recipe_name}, {form}, seed {study.seed}"
    (study.folder / "page.html").write_text(_page(title, tables), encoding="utf-8")
    return text


# --- reward models ---


def reward_tables(study: Study) -> Iterator[Table]:
    """Accuracy of each reward model beside "the longer wins", with a paired test."""
    rows = []
    for name in ("reward", "as_is_reward", "second", *_FILTERS):
        for benchmark, title in SETS.items():
            pairs = _scored_pairs(study, name, benchmark)
            if pairs:
                rows.append([name, title, *_against_longer(pairs, study.seed)])
    if rows:
        header = ["reward model", "pairs of", "accuracy", "longer wins", "difference", "p", "n", "too long"]
        note = "Ties count one half. Difference and p: paired bootstrap over contexts. `second` has learnt from people."
        yield "Reward models", note, header, rows


def _scored_pairs(study: Study, name: str, benchmark: str) -> list[Row]:
    if benchmark != "synthetic":
        file = study.folder / "rewards" / f"{name.replace(' ', '-')}.{benchmark}.jsonl"
        return read_rows(file) if file.exists() else []
    folders = {"reward": study.runs / "reward", "as_is_reward": study.runs / "as_is_reward"}
    folders |= {"second": study.folder / "second"}
    folder = folders.get(name, folder_of(study.folder / "variants", name) / "reward")
    if not (folder / "eval.jsonl").exists() or not (name in folders or name in _FILTERS):
        return []
    return [{**row, "cluster": str(row["prompt_id"])} for row in read_rows(folder / "eval.jsonl")]


def _against_longer(pairs: Sequence[Row], seed: int) -> list[str]:
    scored = [row for row in pairs if row["chosen_reward"] is not None and row["rejected_reward"] is not None]
    if not scored:
        return ["-", "-", "-", "-", "0", str(len(pairs))]
    right = [_half(row["chosen_reward"], row["rejected_reward"]) for row in scored]
    longer = [_half(row["chosen_chars"], row["rejected_chars"]) for row in scored]
    clusters = [row["cluster"] for row in scored]
    test = paired_bootstrap(longer, right, clusters, rng=np.random.default_rng(seed))
    return [
        _share(right, clusters),
        _share(longer, clusters),
        _signed(100 * test.difference, test.ci95 and (100 * test.ci95[0], 100 * test.ci95[1])),
        _p(test.p_value),
        str(len(scored)),
        str(len(pairs) - len(scored)),
    ]


# --- policies ---


def policy_tables(study: Study) -> Iterator[Table]:
    """Benchmarks, and each policy paired with the one it came from."""
    folders = {label: study.folder / "policies" / label for label in {**study.checkpoints(), **study.tries()}}
    rows, paired = [], []
    for run, metrics in BENCHMARKS.items():
        done = {label: folder / run for label, folder in folders.items() if (folder / run / "results.json").exists()}
        for metric in metrics if done else ():
            found = {label: read_json(folder / "results.json")["metrics"][metric] for label, folder in done.items()}
            rows.append([run, metric, *(_metric(found[label]) if label in found else "-" for label in folders)])
            paired += [
                [run, metric, f"{b} - {a}", *_paired(done[a], done[b], metric, study.seed, 100)]
                for a, b in _PAIRS
                if {a, b} <= done.keys()
            ]
    if rows:
        yield "Policies", "Percent, 95 % intervals.", ["benchmark", "metric", *folders], rows
        yield "Policies, paired", "Points, on the same questions.", ["benchmark", "metric", "policies", *_TEST], paired


_PAIRS = (
    *(("vanilla", "sft"), ("sft", "rlsf"), ("vanilla", "rlsf"), ("unguided", "sft")),
    *(("vanilla", "unguided"), ("vanilla", "full sft"), ("vanilla", "dpo")),
)
_TEST = ["difference", "p", "n"]


def _paired(a: Path, b: Path, metric: str, seed: int, times: float = 1) -> list[str]:
    found = {item.name: item for item in compare_runs(a, b, seed=seed).metrics}.get(metric)
    if found is None or found.difference is None:
        return ["-", "-", "0"]
    span = found.ci95 and (times * found.ci95[0], times * found.ci95[1])
    return [_signed(times * found.difference, span), _p(found.p_value), str(found.n)]


def answer_tables(study: Study) -> Iterator[Table]:
    """Answers to held-out prompts: length, refusals, the second model's reward, KL to the vanilla policy."""
    file = study.folder / "answers" / "result.json"
    if not file.exists():
        return
    metrics = read_json(file)["metrics"]
    labels = [label for label in study.checkpoints() if label in metrics]
    rows = [
        [title, *(_number(metrics[label].get(name)) for label in labels)]
        for name, title in (
            ("reward", "second model's reward"),
            ("characters", "characters"),
            ("finished", "ended by themselves"),
            ("kl", "KL to vanilla, nats"),
        )
    ]
    for kind, title in (("harmful", "refuses the harmful"), ("alpaca", "refuses the rest")):
        rows.append([title, *(_share(_refusals(study, label, kind)) for label in labels)])
    yield "Answers to held-out prompts", "Refusals by words: see refusals.py.", ["", *labels], rows
    paired = []
    for a, b in _PAIRS:
        if {a, b} <= set(labels):
            for run, metric in (("rewards", "reward"), ("answers", "characters")):
                one, other = (study.folder / "answers" / label.replace(" ", "_") / run for label in (a, b))
                paired.append([metric, f"{b} - {a}", *_paired(one, other, metric, study.seed)])
    yield "Answers, paired", "On the same prompts.", ["", "policies", *_TEST], paired


def _refusals(study: Study, label: str, kind: str) -> list[float]:
    folder = study.folder / "answers" / label.replace(" ", "_") / "answers"
    return [
        float(is_refusal(record.outputs["completions"][0]))
        for record in read_samples(folder)
        if record.sample.id.startswith(kind) and "completions" in record.outputs
    ]


# --- the rest ---


def best_of_tables(study: Study) -> Iterator[Table]:
    """The second model's reward of the candidate that the first one likes best, of N: the mean over all subsets."""
    file = study.folder / "best-of.jsonl"
    rows = [row for row in (read_rows(file) if file.exists() else []) if len(row["first"]) >= 2]
    if not rows:
        return
    most = max(len(row["first"]) for row in rows)
    full = [row for row in rows if len(row["first"]) == most and None not in row["second"]]
    table = []
    for n in range(1, most + 1):
        chosen = [
            fmean(row["second"][max(some, key=lambda i: row["first"][i])] for some in combinations(range(most), n))
            for row in full
        ]
        best = [fmean(max(row["second"][i] for i in some) for some in combinations(range(most), n)) for row in full]
        table.append([str(n), _number(mean_metric(chosen).to_dict()), _number(mean_metric(best).to_dict())])
    note = f"{len(full)} prompts whose {most} candidates are all valid. Right: the second model's own choice, a bound."
    yield "Best of N", note, ["N", "second model's reward", "the most there is"], table


def label_tables(study: Study) -> Iterator[Table]:
    """How often the method's rank agrees with a judge that knows nothing of it."""
    rows = []
    for judge, title in (("rules", "hand-written rules"), ("reference", "nearer to GPT-4's answer")):
        file = study.folder / "labels" / f"{judge}.jsonl"
        judged = read_rows(file) if file.exists() else []
        for pair in ("all", *sorted({row["pair"] for row in judged})) if judged else ():
            own = [row for row in judged if pair in ("all", row["pair"])]
            clusters = [row["id"] for row in own]
            agrees, longer = ([row[name] for row in own] for name in ("agrees", "longer"))
            test = paired_bootstrap(longer, agrees, clusters, rng=np.random.default_rng(study.seed))
            ties = str(sum(value == 0.5 for value in agrees))
            rows.append(
                [title, pair, _share(agrees, clusters), ties, _share(longer, clusters), _p(test.p_value), str(len(own))]
            )
    if rows:
        header = ["judge", "pair", "rank agrees", "ties", "longer has the better rank", "p of the difference", "n"]
        yield "Is larger and better prompted better?", "Ties count one half.", header, rows


def filter_tables(study: Study) -> Iterator[Table]:
    """What the filters of each variant kept."""
    folders = {"both": study.runs} | {name: folder_of(study.folder / "variants", name) for name in _FILTERS}
    rows = []
    for name, folder in folders.items():
        file = folder / "comparisons" / "result.json"
        if file.exists():
            metrics = read_json(file)["metrics"]
            rows.append([name, str(metrics["comparisons"]), f"{100 * metrics['chosen_longer']:.1f}"])
    if rows:
        yield "Filters", "Pairs kept, and of how many the chosen is the longer.", ["filter", "pairs", "longer, %"], rows


def time_tables(study: Study) -> Iterator[Table]:
    """Wall time and memory of each part, as often as it was run."""
    file = study.folder / "times.jsonl"
    rows = [[row["part"], f"{row['seconds']:.0f}", f"{row['peak_gib']:.2f}"] for row in _rows(file)]
    if rows:
        note = "Of this process, also where a part was done already. Peak: resident memory since the process began."
        yield "Time", note, ["part", "seconds", "peak GiB"], rows


def _rows(file: Path) -> list[Row]:
    return read_rows(file) if file.exists() else []


# --- cells ---


def _half(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)


def _share(values: Sequence[float], clusters: Sequence[str] | None = None) -> str:
    return _metric(mean_metric(values, clusters).to_dict())


def _metric(metric: Mapping[str, Any]) -> str:
    """A share in percent, with its interval."""
    if metric["value"] is None:
        return "-"
    span = " ({:.1f} to {:.1f})".format(*(100 * end for end in metric["ci95"])) if metric["ci95"] else ""
    return f"{100 * metric['value']:.1f}{span}"


def _number(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    span = " ({:.2f} to {:.2f})".format(*metric["ci95"]) if metric["ci95"] else ""
    return f"{metric['value']:.2f}{span}"


def _signed(value: float, span: Sequence[float] | None) -> str:
    return f"{value:+.2f}" + (f" ({span[0]:+.2f} to {span[1]:+.2f})" if span else "")


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _as_json(table: Table) -> Row:
    title, note, header, rows = table
    return {"title": title, "note": note, "header": header, "rows": rows}


def _markdown(table: Table) -> str:
    title, note, header, rows = table
    lines = [f"### {title}", "", note, "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


_STYLE = "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
_STYLE += "td,th{border-bottom:1px solid #ccc;padding:.2em .8em;text-align:left}th{border-bottom-color:#555}"


def _page(title: str, tables: Sequence[Table]) -> str:
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{escape(title)}</h1>")
    for name, note, header, rows in tables:
        head = "".join(f"<th>{escape(cell)}" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
        parts.append(f"<h2>{escape(name)}</h2><p>{escape(note)}<table><tr>{head}{body}</table>")
    return "\n".join([*parts, ""])
