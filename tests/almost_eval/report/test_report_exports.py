"""Tables for other documents, read back by those who read them."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import sample, write_run

from almost_eval.errors import InputError
from almost_eval.report.exports import COLUMNS, to_csv, to_latex, to_markdown, to_model_index
from almost_eval.report.matrix import build_matrix
from almost_eval.report.runs import RunSet, load_runs
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["report_fixtures"]

HOSTILE = 'a|b_c & <i>50%</i> $x$ #1 {y} "q", \\end\nnext'


@pytest.fixture
def hostile(tmp_path: Path) -> RunSet:
    for model, right in ((HOSTILE, 10), ("plain", 2)):
        records = [SampleRecord(sample(f"{i}"), {}, Score(float(i < right))) for i in range(20)]
        write_run(tmp_path / model[:1], records, model=model)
    return load_runs([tmp_path / "a", tmp_path / "p"])


def test_csv_holds_every_number(nano_runs: Path) -> None:
    found = load_runs([nano_runs])
    matrix = build_matrix(found)
    rows = list(csv.DictReader(io.StringIO(to_csv(found, matrix))))
    assert tuple(rows[0]) == COLUMNS
    n = sum(len(run.metrics) + len(run.results["baselines"]) for run in found.runs)
    assert len(rows) == n
    for run in found.runs:
        mine = {(row["kind"], row["metric"]): row for row in rows if row["folder"] == str(run.folder)}
        for name, metric in run.metrics.items():
            row = mine["metric", name]
            assert (row["value"], row["n"]) == (str(metric["value"]), str(metric["n"]))
            assert [row["ci_low"], row["ci_high"]] == [str(bound) for bound in metric["ci95"] or ("", "")]
        for name, metric in run.results["baselines"].items():
            assert mine["trivial baseline", name]["value"] == str(metric["value"])
    (delta,) = matrix.deltas
    (compared,) = [row for row in rows if row["p_holm"]]
    assert compared["folder"] == str(delta.run.folder)
    assert float(compared["difference"]) == delta.metric.difference
    assert float(compared["p_holm"]) == delta.p_holm
    assert compared["baseline_model"] == "nano/almost"


def test_csv_keeps_any_name(hostile: RunSet) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(hostile, None))))
    assert [row["model"] for row in rows] == [HOSTILE, "plain"]


def cells(markdown: str) -> list[list[str]]:
    table = markdown.split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_markdown_of_one_model(nano_runs: Path) -> None:
    found = load_runs([nano_runs / "hhh"])
    header, rule, *rows = cells(to_markdown(found, None))
    assert header == ["benchmark", "metric", "score", "95 % interval", "n", "unscored"]
    assert rule == ["---"] + ["---:"] * 5
    assert len(rows) == len(found.runs[0].metrics)
    metric = found.runs[0].metrics["accuracy"]
    assert rows[0][1:3] == ["accuracy", f"{100 * metric['value']:.1f}"]


def test_markdown_of_several_models(nano_runs: Path) -> None:
    found = load_runs([nano_runs / "hhh", nano_runs / "hhh-small", nano_runs / "mmlu"])
    matrix = build_matrix(found)
    header, _, *rows = cells(to_markdown(found, matrix))
    assert len(header) == 3
    assert [row[0] for row in rows] == ["nano/almost", "nano/vanilla-small"]
    assert rows[1][1][-1] in "▲▼≈"
    assert rows[1][2] == "-"  # no run
    assert not set("▲▼≈") & set("".join(rows[0]))  # nothing is compared with itself


def test_markdown_takes_no_markup_from_a_name(hostile: RunSet) -> None:
    table = cells(to_markdown(hostile, build_matrix(hostile)))
    assert {len(row) for row in table} == {2}
    assert table[2][0] == r"a\|b\_c \& \<i\>50%\</i\> $x$ \#1 {y} \"q\", \\end next".replace(r"\"", '"')


def test_latex(hostile: RunSet) -> None:
    text = to_latex(hostile, build_matrix(hostile))
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert [line.endswith(r" \\") for line in body] == [True, True]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [1, 1]  # columns
    name = body[0].split(" & ")[0] if r"\&" not in body[0] else body[0]
    for sign in "%$#_{}":
        assert f"\\{sign}" in name
    assert r"\textbackslash{}end" in name
    assert "\n" not in name
    assert text.count(r"\begin{tabular}{lr}") == text.count(r"\end{tabular}") == 1


def test_model_index_is_read_by_the_hub(nano_runs: Path) -> None:
    from huggingface_hub import ModelCard

    found = load_runs([nano_runs / "hhh", nano_runs / "truthfulqa", nano_runs / "mmlu"])
    card: Any = ModelCard(to_model_index(found) + "\n# A model\n")
    assert card.data.model_name == "nano/almost"
    by_name = {(result.dataset_type, result.metric_name): result for result in card.data.eval_results}
    for run in found.runs:
        value = run.metrics[run.headline]["value"]
        assert by_name[f"nano-{run.task}", run.headline].metric_value == pytest.approx(value, abs=1e-6)
    mmlu = by_name["nano-mmlu", "accuracy"]
    assert (mmlu.metric_type, mmlu.task_type) == ("accuracy", "text-generation")
    assert mmlu.dataset_args == {"protocol": "5-shot", "num_few_shot": 5}


def test_model_index_of_a_reward_model_and_of_real_data(nano_runs: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card: Any = ModelCard(to_model_index(load_runs([nano_runs / "hhh-reward"])))
    assert {result.task_type for result in card.data.eval_results} == {"text-classification"}
    write_run(tmp_path / "run", [SampleRecord(sample("1"), {}, Score(1.0))], model="org/m: a - 'name'")
    card = ModelCard(to_model_index(load_runs([tmp_path / "run"])))
    (result,) = card.data.eval_results
    assert (card.data.model_name, result.dataset_type) == ("org/m: a - 'name'", "HuggingFaceH4/hhh_alignment")


def test_model_index_refuses_several_models_and_nothing(nano_runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model card is about one model"):
        to_model_index(load_runs([nano_runs / "hhh", nano_runs / "hhh-small"]))
    held = {"accuracy": {"value": None, "stderr": None, "ci95": None, "n": 1, "unscored": 0, "withheld": "why"}}
    validity = {"passed": False, "reason": "why", "checks": {}}
    results = {"metrics": held, "validity": validity}
    write_run(tmp_path / "run", [SampleRecord(sample("1"), {}, Score(1.0))], results=results)
    found = load_runs([tmp_path / "run"])
    with pytest.raises(InputError, match="no headline stands"):
        to_model_index(found)
    assert "withheld" in to_markdown(found, None)
    assert "Withheld: m, hhh: why." in to_markdown(found, None)
    assert json.loads((tmp_path / "run/results.json").read_text())["metrics"] == held


def test_published_figures_are_in_no_export(nano_runs: Path) -> None:
    from almost_eval.report.page import reference_rows

    found = load_runs([nano_runs])
    exported = to_csv(found, None) + to_markdown(found, None) + to_latex(found, None)
    rows = reference_rows()
    assert [row.value for row in rows] == [
        *("55.0 %", "58.5 %", "about 75 %", "513 : 694", "583 : 704", "664 : 655.5", "693 : 638", "525 : 605")
    ]
    assert all(row.source and row.protocol for row in rows)
    assert not any(row.system in exported for row in rows)
