"""Rows of lm-eval's tasks that are not as the task expects: named before a model is read, or counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_harness import documents, make_task

from almost_eval.data.sources import DataSource, find_data
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import DataError, InputError, RunError, StoreError
from almost_eval.run.runner import Run
from almost_eval.tasks import harness
from almost_eval.tasks.harness import Harness, load_lm_eval_tasks

HERE = DataSource("hub", None)
BAD = 3
"""The row that is not as the others."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run(labels, **settings)`: results of a task whose rows have these labels; the built-in model answers."""

    def results(labels: list[Any], **settings: Any) -> dict[str, Any]:
        import datasets

        rows = datasets.Dataset.from_list([row | {"label": a} for row, a in zip(documents(6), labels, strict=True)])
        task = make_task("t", custom_dataset=lambda **_: datasets.DatasetDict({"test": rows}), **settings)
        monkeypatch.setattr(harness, "load_lm_eval_tasks", lambda names, data: {"t": task})
        return Run(Harness(["t"], HERE), HFEngine("nano/almost")).execute(tmp_path / "run")[0]

    return results


def _labels(bad: object) -> list[Any]:
    return [bad if row == BAD else row % 3 for row in range(6)]


@pytest.mark.parametrize("label", [7, -1])
def test_answers_that_are_no_choice_are_counted(
    label: int, run: Callable[..., dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """A test set without its labels has -1 for each: lm-eval takes every document for wrong, without a word."""
    results = run(_labels(label))
    assert results["metrics"]["t/acc"]["n"] == 6  # as lm-eval has it
    assert results["details"] == {"documents_without_a_right_choice": 1}
    assert "question" not in capfd.readouterr().err  # lm-eval prints the row


def test_texts_that_are_no_choice_are_counted(run: Callable[..., dict[str, Any]]) -> None:
    results = run([str(label) for label in _labels(2)])  # lm-eval looks for the text "2" among the choices
    assert results["details"] == {"documents_without_a_right_choice": 6}


def test_right_answers_have_no_count(run: Callable[..., dict[str, Any]]) -> None:
    assert run(_labels(0))["details"] == {}


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        (_labels(None), {}, "TypeError: None is no number of a choice, and no text of one"),
        ([float(a) for a in _labels(0)], {}, r"TypeError: 0\.0 is no number of a choice"),
        (_labels(7), {"doc_to_target": "{{choices[label]}}"}, "UndefinedError: list object has no element 7"),
    ],
)
def test_an_answer_that_cannot_be_read_is_told_by_its_row_before_weights_are(
    labels: list[Any],
    settings: dict[str, Any],
    words: str,
    run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was a traceback after the model had answered."""
    monkeypatch.setattr("almost_eval.engines.hf.load_weights", lambda *_, **__: pytest.fail("weights were read"))
    row = BAD if None in labels or 7 in labels else 0
    with pytest.raises(
        InputError, match=rf"^sample t/{row}: lm-eval cannot read the right answer of t \({words}.*mend"
    ):
        run(labels, **settings)


def test_scoring_that_fails_is_one_line(run: Callable[..., dict[str, Any]]) -> None:
    def process(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        raise ZeroDivisionError("division\nby zero")

    with pytest.raises(RunError, match=r"^sample t/0: the scoring of t fails \(ZeroDivisionError: division by zero\)"):
        run(_labels(0), process_results=process, metric_list=[{"metric": "acc"}])


# --- files ---


def _root(folder: Path) -> Path:
    rows = [{"id": str(i), "question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
            for i in range(3)]  # fmt: skip
    files = folder / "allenai" / "ai2_arc" / "ARC-Easy"
    files.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (files / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture
def arc(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], object]:
    """Load ARC from a data root. The index of all of lm-eval's tasks takes 10 seconds; one folder is enough."""
    monkeypatch.setattr(harness, "_folder_of", lambda names: "arc")
    return lambda root: load_lm_eval_tasks(["arc_easy"], find_data("hub", root))


def test_files_without_rows_and_links_that_lead_nowhere_are_named(
    arc: Callable[[Path], object], tmp_path: Path
) -> None:
    files = _root(tmp_path)
    assert arc(tmp_path)
    test = files / "test.jsonl"
    whole = test.read_text()
    test.write_text("")
    with pytest.raises(DataError, match=r"test\.jsonl holds no rows; download it again"):
        arc(tmp_path)
    test.unlink()
    test.symlink_to("../blobs/1234")
    with pytest.raises(DataError, match=r"test\.jsonl is a link to \.\./blobs/1234, which is not there; copy the data"):
        arc(tmp_path)
    test.unlink()
    test.write_text(whole.replace('"answerKey": "A"', '"answerKey": "Z"'))
    with pytest.raises(InputError, match=r"'Z' is not in list; most likely the first row of its data is not as"):
        arc(tmp_path)


def test_what_nano_does_not_hold_is_told_without_a_folder_of_this_machine() -> None:
    with pytest.raises(DataError, match=r"^the nano data holds no cais/mmlu \(abstract_algebra\); use --data hub"):
        load_lm_eval_tasks(["mmlu_abstract_algebra"], find_data("nano", None))


def test_a_task_and_its_group_are_named_once(hub: DataSource) -> None:
    with pytest.raises(InputError, match=r"Duplicate task 'mmlu_anatomy': .*; name it once, or its group alone"):
        load_lm_eval_tasks(["mmlu_anatomy", "mmlu_stem"], hub)


# --- tasks of one's own ---

OWN = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Results of a YAML file; its text, and other names beside it."""
    monkeypatch.setattr(harness, "_folder_of", lambda names: "arc")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in documents(4)))

    def results(text: str, output: str = "run") -> dict[str, Any]:
        file = tmp_path / "mine.yaml"
        file.write_text(text.replace("ROWS", str(rows)))
        return Run(Harness([str(file)], HERE), HFEngine("nano/almost")).execute(tmp_path / output)[0]

    return results


def test_a_task_of_ones_own_is_a_file(own: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    results = own(OWN)
    assert (results["headline"], results["metrics"]["mine/acc"]["n"]) == ("mine/acc", 4)
    assert own(OWN)["timing"] == results["timing"]  # the same run
    with pytest.raises(StoreError, match=r"holds another run: settings\.definitions\.mine was"):
        own(OWN.replace("{metric: acc}", "{metric: acc_norm}"))
    (tmp_path / "f.py").write_text("def ask(doc):\n    return doc['question'] + ' Answer:'\n")
    other = OWN.replace('"{{question}}"', "!function f.ask")
    assert own(other, "other")["metrics"]["mine/acc"]["n"] == 4
    assert own(other, "other")["metrics"]["mine/acc"]["n"] == 4  # a function is digested by its source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [x\n", r"lm-eval cannot load .*mine\.yaml: while parsing a flow sequence .*line 1.*; mend the file"),
        ("a: 1\n", "Unknown config shape: .*; mend the file"),
        (OWN.replace("ROWS", "/no/such.jsonl"), "the task's data_files cannot be read: .*no/such.jsonl"),
    ],
)
def test_a_file_that_is_no_task_is_one_line(text: str, words: str, own: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=words) as refused:
        own(text)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_no_file(arc: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match=r"there is no file nope\.yaml; give the YAML file of a task or group"):
        load_lm_eval_tasks(["nope.yaml"], HERE)
    with pytest.raises(
        InputError, match=r"no task 'arc_eazy'; did you mean 'arc_easy'.*; one of your own is given by its"
    ):
        load_lm_eval_tasks(["arc_eazy"], HERE)


def test_a_group_of_ones_own_has_its_score_as_the_headline(
    hub: DataSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "_folder_of", lambda names: "mmlu/default")
    file = tmp_path / "group.yaml"
    file.write_text("group: ours\ntask: [mmlu_anatomy, mmlu_virology]\naggregate_metric_list: [{metric: acc}]\n")
    task = Harness([str(file)], hub, limit=1)
    assert list(task.tasks) == ["mmlu_anatomy", "mmlu_virology"]
    assert task.headline == "ours/acc"


pytest_plugins = ["benchmark_fixtures"]
