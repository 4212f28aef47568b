"""The rows that are named are the rows that are read, whatever a cache or the working directory holds of that name.

`datasets` keeps what it has built by the last name of a folder, its card and the configuration: two folders that are
called the same and hold other rows are one to it. Anyone who uses lm-eval has the real sets in that cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as parquet
import pytest

from almost_eval.data.sources import DataSource, find_data, fingerprint
from almost_eval.errors import DataError
from almost_eval.nano.data import write_data
from almost_eval.run import provenance
from almost_eval.tasks.harness import Harness

TRUTHFULQA = "truthfulqa/truthful_qa"
FILE = "multiple_choice/validation-00000-of-00001.parquet"
LAYOUTS = ["as the hub's", "lines with a card", "lines", "one parquet file", "under data", "of its own"]


def doctored(root: Path) -> Path:
    """The nano world with other questions in TruthfulQA, in place."""
    file = root / TRUTHFULQA / FILE
    table = parquet.read_table(file)
    rows = [{**row, "question": f"Doctored: {row['question']}"} for row in table.to_pylist()]
    parquet.write_table(table.from_pylist(rows, schema=table.schema), file)
    return root


def laid_out(root: Path, layout: str) -> Path:
    """The nano world with its TruthfulQA in other files and folders, in place."""
    folder = root / TRUTHFULQA
    file = folder / FILE
    card = folder / "README.md"
    if layout.startswith("lines"):
        for table in folder.rglob("*.parquet"):
            rows = parquet.read_table(table).to_pylist()
            table.with_name("validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            table.unlink()
        card.write_text(card.read_text().replace("validation-*", "validation*"))
    elif layout == "one parquet file":
        file.rename(file.with_name("validation.parquet"))
    elif layout == "under data":
        shutil.move(file.parent, folder / "data" / "multiple_choice")
    elif layout == "of its own":
        shutil.move(file, folder / "questions.parquet")
        card.write_text(card.read_text().replace("multiple_choice/validation-*", "questions.parquet"))
    if layout in ("lines", "one parquet file", "under data"):
        card.unlink()
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another cache of `datasets`, empty."""
    folder = tmp_path / "cache of datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def poisoned(cache: Path, tmp_path: Path) -> Path:
    """That cache with doctored rows: as read from a folder, and as if they had come from the hub."""
    root = doctored(write_data(tmp_path / "doctored"))
    for layout in ("as the hub's", "lines with a card"):
        root = laid_out(root, layout)
        datasets.load_dataset(str(root / TRUTHFULQA), "multiple_choice")
    shutil.copytree(cache / "truthful_qa", cache / TRUTHFULQA.replace("/", "___"))
    return cache


def questions(data: DataSource) -> list[str]:
    """What lm-eval's own TruthfulQA reads there."""
    task = Harness(["truthfulqa_mc1"], data)
    task.samples()
    docs = list(task._docs["truthfulqa_mc1"].values())
    assert task.data_fingerprint() == fingerprint(docs)  # of the rows that are used, not of the rows that were meant
    return [doc["question"] for doc in docs]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_data_root_is_read_whatever_the_cache_holds(tmp_path: Path, layout: str) -> None:
    whole = DataSource("hub", write_data(tmp_path / "whole"))
    expected = [row["question"] for row in whole.read(TRUTHFULQA, "multiple_choice", "validation")]
    assert questions(DataSource("hub", laid_out(write_data(tmp_path / "root"), layout))) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_changed_are_read_anew(cache: Path, tmp_path: Path, layout: str) -> None:
    data = DataSource("hub", laid_out(doctored(write_data(tmp_path / "root")), layout))
    assert all(question.startswith("Doctored") for question in questions(data))
    shutil.rmtree(tmp_path / "root")
    laid_out(write_data(tmp_path / "root"), layout)
    assert not any(question.startswith("Doctored") for question in questions(data))
    assert not cache.exists()  # nothing of the root is left for others to read, either


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("harness", ("--tasks", "truthfulqa_mc1,truthfulqa_mc2")),
        ("truthfulqa", ()),
        ("mmlu", ("--subjects", "anatomy", "--shots", 1)),
    ],
)
@pytest.mark.parametrize("data", ["nano", "root"])
def test_results_are_those_under_an_empty_cache(
    almost_eval: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    poisoned: Path,
    task: str,
    options: tuple[object, ...],
    data: str,
) -> None:
    root = laid_out(write_data(tmp_path / "root"), "lines with a card")
    (root / "cais/mmlu/nano_food").rename(root / "cais/mmlu/anatomy")
    options = tuple("nano_food" if data == "nano" and option == "anatomy" else option for option in options)
    options = (*options, "--limit", 2, *(("--data", "nano") if data == "nano" else ("--data-root", root)))
    results = []
    for cache in (poisoned, tmp_path / "empty"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        out = tmp_path / f"run-{cache.name}"
        outcome = almost_eval(task, "--model", "nano/almost", *options, "--output", out)
        assert outcome.code == 0, outcome.err
        spec = json.loads((out / "spec.json").read_text())
        metrics = json.loads((out / "results.json").read_text())["metrics"]
        results.append((spec["data"], spec["prompt_ids_digest"], metrics))
    assert results[0] == results[1]


class TestFolderWhereWeStand:
    """`datasets` takes a folder `truthfulqa/truthful_qa` in the working directory for the data set of that name."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(write_data(tmp_path / "here"))

    @pytest.mark.usefixtures("poisoned")
    def test_the_hub_is_the_hub(self) -> None:
        hub = DataSource("hub", None)
        assert all(question.startswith("Doctored") for question in questions(hub))
        rows = hub.read(TRUTHFULQA, "multiple_choice", "validation")
        assert all(row["question"].startswith("Doctored") for row in rows)

    @pytest.mark.usefixtures("cache")
    def test_what_the_hub_does_not_give_is_refused(self) -> None:
        with pytest.raises(DataError, match="not found"):
            questions(DataSource("hub", None))
        with pytest.raises(DataError, match="not found"):
            DataSource("hub", None).read(TRUTHFULQA, "multiple_choice", "validation")


@pytest.mark.usefixtures("poisoned")
def test_nano_is_nano(tmp_path: Path) -> None:
    """A set that the nano world does not hold is refused, and not taken from the hub under the name of nano."""
    data = DataSource("nano", tmp_path / "doctored")
    shutil.rmtree(tmp_path / "doctored/truthfulqa")
    with pytest.raises(DataError, match=r"the nano data holds no truthfulqa/truthful_qa \(multiple_choice\)"):
        questions(data)
    with pytest.raises(DataError, match="the nano data holds no allenai/ai2_arc"):
        Harness(["arc_easy"], find_data("nano", None)).samples()


@pytest.mark.usefixtures("cache")
def test_a_configuration_that_the_root_does_not_hold(tmp_path: Path) -> None:
    """Without a card `datasets` reads every file under the folder for any name: all subjects as one."""
    root = write_data(tmp_path / "root")
    (root / "cais/mmlu/README.md").unlink()
    with pytest.raises(DataError, match="holds no configuration 'anatomy'"):
        Harness(["mmlu_anatomy"], DataSource("hub", root)).samples()


def test_the_commit_is_that_of_this_tree_whatever_git_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a hook of another repository git's variables name that one. Without git nothing is said."""
    here = provenance.commit()
    other = tmp_path / "other"
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.chdir(tmp_path)
    assert provenance.commit() == here
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None
    assert capfd.readouterr().err == ""
