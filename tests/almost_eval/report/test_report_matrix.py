"""Models beside each other: who is compared with whom, and which marks stand for the table as a whole."""

from pathlib import Path
from typing import Any

import pytest
from report_fixtures import evaluate, sample, write_run

from almost_eval.compare.comparison import compare_runs
from almost_eval.errors import InputError, StoreError
from almost_eval.report.exports import to_csv, to_markdown
from almost_eval.report.matrix import Matrix, build_matrix
from almost_eval.report.runs import load_runs
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["report_fixtures"]


def records(scores: list[float | None]) -> list[SampleRecord]:
    return [SampleRecord(sample(f"s{i:02}"), {}, Score(score)) for i, score in enumerate(scores)]


def only_b(n: int) -> tuple[list[float | None], list[float | None]]:
    """Twenty samples: n that only the second model has right, the others right in both."""
    return [*[0.0] * n, *[1.0] * (20 - n)], [*[1.0] * 20]


def runs(folder: Path, gains: dict[str, int]) -> list[Path]:
    """Two models, a and b, on one benchmark for each entry; b has so many more right."""
    folders = []
    for task, n in gains.items():
        for model, scores in zip("ab", only_b(n), strict=True):
            folders.append(write_run(folder / f"{task}-{model}", records(scores), task=task, model=model))
    return folders


def marks(matrix: Matrix) -> list[str]:
    return [delta.mark for delta in matrix.deltas]


def test_marks_hold_for_the_table_as_a_whole(tmp_path: Path) -> None:
    # McNemar's exact p for 0 against n: 2 / 2^n.
    # hhh 2/64 = 0.03125, truthfulqa 2/256 = 0.0078125, mmlu 2/32 = 0.0625. Sorted, times 3, 2, 1, never below the one
    # before: 0.0234375, 0.0625, 0.0625. So hhh is significant alone, and not in this table.
    matrix = build_matrix(load_runs(runs(tmp_path, {"hhh": 6, "truthfulqa": 8, "mmlu": 5})))
    assert [delta.metric.p_value for delta in matrix.deltas] == pytest.approx([0.03125, 0.0078125, 0.0625])
    assert [delta.p_holm for delta in matrix.deltas] == pytest.approx([0.0625, 0.0234375, 0.0625])
    assert marks(matrix) == ["same", "better", "same"]
    assert [delta.metric.difference for delta in matrix.deltas] == pytest.approx([0.30, 0.40, 0.25])
    assert [len(delta.comparison.flipped) for delta in matrix.deltas] == [6, 8, 5]


def test_alone_the_same_difference_is_marked(tmp_path: Path) -> None:
    matrix = build_matrix(load_runs(runs(tmp_path, {"hhh": 6})))
    assert [delta.p_holm for delta in matrix.deltas] == pytest.approx([0.03125])
    assert marks(matrix) == ["better"]


def test_the_other_way_round(tmp_path: Path) -> None:
    matrix = build_matrix(load_runs(runs(tmp_path, {"hhh": 8})), baseline="b")
    assert matrix.models == ["b", "a"]
    assert marks(matrix) == ["worse"]
    assert matrix.deltas[0].metric.difference == pytest.approx(-0.40)


def test_three_models_are_one_family(tmp_path: Path) -> None:
    folders = runs(tmp_path, {"hhh": 6})
    folders.append(write_run(tmp_path / "c", records([1.0] * 20), model="c"))
    matrix = build_matrix(load_runs(folders))
    # b and c against a, each 0.03125: times 2, times 1 but never below: 0.0625 both.
    assert [delta.p_holm for delta in matrix.deltas] == pytest.approx([0.0625, 0.0625])
    assert marks(matrix) == ["same", "same"]


def test_what_is_withheld_is_neither_compared_nor_counted(tmp_path: Path) -> None:
    folders = runs(tmp_path, {"hhh": 6, "mmlu": 8})
    validity = {"passed": False, "reason": "3 of 20 samples are missing", "checks": {}}
    write_run(tmp_path / "held", records([1.0] * 20), task="mmlu", model="c", results={"validity": validity})
    matrix = build_matrix(load_runs([*folders, tmp_path / "held"]))
    assert [(delta.run.label, delta.run.task) for delta in matrix.deltas] == [("b", "hhh"), ("b", "mmlu")]
    cell = matrix.cell("c", 1)
    assert cell is not None
    assert cell.delta is None
    assert matrix.cell("c", 0) is None


def test_a_single_cluster_has_no_mark(tmp_path: Path) -> None:
    for model, value in (("a", 0.0), ("b", 1.0)):
        lines = [SampleRecord(sample(f"{i}", cluster="one"), {}, Score(value)) for i in range(4)]
        write_run(tmp_path / model, lines, model=model)
    matrix = build_matrix(load_runs([tmp_path / "a", tmp_path / "b"]))
    assert (marks(matrix), matrix.deltas[0].p_holm) == (["unknown"], None)


@pytest.mark.parametrize(
    "other",
    [
        {"data": {"source": "hub", "fingerprint": "e" * 64}},
        {"prompt_set": {"name": "builtin", "digest": "d"}},
    ],
)
def test_other_questions_are_another_column(tmp_path: Path, other: dict[str, Any]) -> None:
    write_run(tmp_path / "a", records([1.0]), model="a")
    write_run(tmp_path / "b", records([1.0]), model="b", spec=other)
    found = load_runs([tmp_path / "a", tmp_path / "b"])
    assert len(found.benchmarks) == 2
    assert len({benchmark.label for benchmark in found.benchmarks}) == 2
    assert not found.comparable


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", records([1.0]), spec={"weight_digest": "1111111122"})
    write_run(tmp_path / "b", records([1.0]), spec={"weight_digest": "2222222211"})
    write_run(tmp_path / "again", records([1.0]), spec={"weight_digest": "2222222211"})
    assert load_runs([tmp_path / "a", tmp_path / "b"]).models == ["m (11111111)", "m (22222222)"]
    assert load_runs([tmp_path / "b", tmp_path / "again"]).models == ["m (b)", "m (again)"]


def test_a_folder_of_runs(tmp_path: Path) -> None:
    folders = runs(tmp_path, {"hhh": 6})
    (tmp_path / "notes").mkdir()
    unfinished = write_run(tmp_path / "unfinished", records([1.0]), task="mmlu")
    (unfinished / "results.json").unlink()
    found = load_runs([tmp_path])
    assert [run.folder for run in found.runs] == folders
    assert found.unfinished == [str(unfinished)]
    with pytest.raises(StoreError, match="is not finished; run its command again"):
        load_runs([unfinished])


def test_refused(tmp_path: Path) -> None:
    first, second = runs(tmp_path, {"hhh": 6})
    with pytest.raises(InputError, match="is given twice"):
        load_runs([first, second, first])
    with pytest.raises(InputError, match=r"--baseline c: no such model; known: a, b"):
        build_matrix(load_runs([first, second]), baseline="c")
    with pytest.raises(StoreError, match="give the folder of a run"):
        load_runs([tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("command", "names"),
    [(("truthfulqa", "--metrics"), ("mc1", "mc2")), (("harness", "--tasks"), ("truthfulqa_mc1", "truthfulqa_mc2"))],
    ids=["truthfulqa", "harness"],
)
def test_a_list_in_another_order_is_the_same_benchmark(
    tmp_path: Path, command: tuple[str, ...], names: tuple[str, str]
) -> None:
    """One column, and in it one metric: that of the first run."""
    a = evaluate(tmp_path / "a", *command, ",".join(names), "--limit", 4, "--model", "nano/sft")
    b = evaluate(tmp_path / "b", *command, ",".join(reversed(names)), "--limit", 4, "--model", "nano/almost")
    run_set = load_runs([a, b])
    [benchmark] = run_set.benchmarks
    matrix = build_matrix(run_set)
    assert benchmark.headline.startswith(names[0])
    shown = [matrix.cell(model, 0) for model in ("nano/sft", "nano/almost")]
    assert [cell and cell.metric for cell in shown] == [run.metrics[benchmark.headline] for run in run_set.runs]
    [delta] = matrix.deltas
    assert delta.metric.name == benchmark.headline
    assert to_markdown(run_set, matrix).count("\n| nano/") == 2
    [compared] = [
        line for line in to_csv(run_set, matrix).splitlines() if "nano/sft" in line and ",nano/almost," in line
    ]
    assert f",metric,{benchmark.headline}," in compared
    comparison = compare_runs(a, b)
    assert comparison.warnings == ()
    assert comparison.protocol == "+".join(names)


def test_models_with_no_benchmark_in_common_are_named(tmp_path: Path) -> None:
    for task, model in (("hhh", "a"), ("mmlu", "b")):
        write_run(tmp_path / model, records([1.0, 0.0]), task=task, model=model)
    header, _, *rows = to_markdown(load_runs([tmp_path / "a", tmp_path / "b"]), None).splitlines()[:4]
    assert [cell.strip() for cell in header.split("|")[1:3]] == ["benchmark", "model"]
    assert [row.split("|")[2].strip() for row in rows] == ["a", "b"]
