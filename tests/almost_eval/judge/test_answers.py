"""Answers: drawn the same however they are batched or interrupted, and refused before a weight is loaded."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from almost_eval.data.sources import find_data
from almost_eval.engines.build import EngineOptions
from almost_eval.errors import DataError, InputError, StoreError
from almost_eval.files import write_rows
from almost_eval.judge.answers import (
    ArchivedSystem,
    ModelSystem,
    Sampling,
    answer_files,
    digest_answers,
    distinct,
    open_system,
    question_line,
)
from almost_eval.judge.build import JudgeOptions, open_judge
from almost_eval.judge.questions import find_questions, read_answers, read_questions
from almost_eval.judge.records import Question
from almost_eval.judge.results import verify_judged
from almost_eval.judge.run import JudgeRun
from almost_eval.progress import Progress
from almost_eval.run.store import read_samples
from almost_eval.tasks.base import ReasoningRule
from almost_eval.types import Completion

SAMPLING = Sampling(max_new_tokens=48)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return find_questions(None, find_data("nano", None), limit=12)[0]


@pytest.fixture(scope="module")
def written(questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nano/almost answers when nothing disturbs it."""
    file = tmp_path_factory.mktemp("written") / "answers/almost.jsonl"
    ModelSystem("nano/almost", questions, SAMPLING).write(file, Progress())
    return file


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("almost_eval.engines.hf.load_weights", loaded)


def by_id(file: Path) -> dict[int, str]:
    return {row["question_id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}


def test_lines_are_fastchats(written: Path, questions: list[Question]) -> None:
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert {tuple(line) for line in lines} == {("question_id", "text", "answer_id", "model_id", "metadata")}
    assert {line["model_id"] for line in lines} == {"nano/almost"}
    assert all(isinstance(line["question_id"], int) for line in lines)
    assert {line["metadata"]["sampling"]["temperature"] for line in lines} == {0.7}
    name, answers = read_answers(written, questions)
    assert name == "nano/almost"
    assert all(answer.text == answer.text.strip() != "" for answer in answers.values())
    assert digest_answers(answers) == ArchivedSystem(written, questions).spec()["digest"]


@pytest.mark.parametrize("kept", [0, 1, 7, 12])
def test_a_killed_process_is_gone_on_from(kept: int, written: Path, questions: list[Question], tmp_path: Path) -> None:
    file = tmp_path / "almost.jsonl"
    lines = written.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:kept]) + '{"question_id": 3, "te')  # as a kill in the middle of a write leaves it
    answers = ModelSystem("nano/almost", questions, SAMPLING).write(file, Progress())
    assert by_id(file) == by_id(written)
    assert list(answers) == [question.id for question in questions]
    assert file.read_text().startswith("".join(lines[:kept]))


def test_batches_change_no_draw_and_seeds_do(written: Path, questions: list[Question], tmp_path: Path) -> None:
    single = EngineOptions(batch_size=1)
    ModelSystem("nano/almost", questions, SAMPLING, single).write(tmp_path / "single.jsonl", Progress())
    assert by_id(tmp_path / "single.jsonl") == by_id(written)
    seeded = dataclasses.replace(SAMPLING, seed=1)
    ModelSystem("nano/almost", questions, seeded).write(tmp_path / "seeded.jsonl", Progress())
    assert by_id(tmp_path / "seeded.jsonl") != by_id(written)


def test_nothing_is_loaded_where_nothing_is_missing(
    written: Path, questions: list[Question], no_weights: None, tmp_path: Path
) -> None:
    system = ModelSystem("nano/almost", questions, SAMPLING)
    assert digest_answers(system.write(written, Progress())) == ArchivedSystem(written, questions).spec()["digest"]
    system = ModelSystem("nano/almost", questions, SAMPLING)
    with pytest.raises(AssertionError, match="weights were loaded"):
        system.write(tmp_path / "new.jsonl", Progress())


def test_the_chosen_template_and_its_stop_strings(questions: list[Question]) -> None:
    chosen = ModelSystem("nano/vanilla-small", questions, dataclasses.replace(SAMPLING, template="vicuna", stop=("x",)))
    assert chosen.prompts[0].endswith(f"USER: {questions[0].text} ASSISTANT:")
    assert chosen.spec()["sampling"]["stop"] == ["USER:", "x"]
    assert chosen.spec()["template"]["name"] == "vicuna"
    bare = ModelSystem("nano/vanilla-small", questions, dataclasses.replace(SAMPLING, template="none"))
    assert bare.prompts == [question.text for question in questions]
    assert bare.spec()["template"] is None


@pytest.mark.usefixtures("no_weights")
def test_what_cannot_fit_is_refused_with_what_would(questions: list[Question]) -> None:
    with pytest.raises(InputError, match=r"and 2040 new ones do not fit the 2048 of nano/almost; give --max-new-") as e:
        ModelSystem("nano/almost", questions, Sampling(max_new_tokens=2040))
    fits = int(str(e.value).split("--max-new-tokens ")[1].split()[0])
    ModelSystem("nano/almost", questions, Sampling(max_new_tokens=fits))
    with pytest.raises(InputError, match="do not fit"):
        ModelSystem("nano/almost", questions, Sampling(max_new_tokens=fits + 1))


def test_a_file_that_this_run_did_not_write(questions: list[Question], tmp_path: Path) -> None:
    system = ModelSystem("nano/almost", questions, SAMPLING)
    file = tmp_path / "answers.jsonl"
    line = {"question_id": 1, "text": "a", "model_id": "m"}
    for lines, problem in (
        ([line, line], "line 2: question 1 is not asked, or answered twice"),
        ([line | {"question_id": 900}], "line 1: question 900 is not asked"),
        ([{"text": "a"}], "line 1 is not an answer"),
    ):
        write_rows(file, lines, ascii_only=True)
        with pytest.raises(StoreError, match=problem):
            system.write(file, Progress())


# --- answer files


def answer_file(tmp_path: Path, questions: list[Question], **texts: str) -> Path:
    file = tmp_path / "answers.jsonl"
    write_rows(
        file,
        [{"question_id": q.id, "text": texts.get(f"q{q.id}", "a"), "model_id": "m"} for q in questions],
        ascii_only=True,
    )
    return file


def test_two_megabytes_are_refused_or_cut_on_purpose(questions: list[Question], tmp_path: Path) -> None:
    file = answer_file(tmp_path, questions, q3="x" * 2_000_000)
    with pytest.raises(InputError, match=r"1 answers are longer than 100,000 characters \(question 3; .* 2,000,000\)"):
        ArchivedSystem(file, questions)
    assert len(ArchivedSystem(file, questions, limit=None).known()["3"].text) == 2_000_000


def test_half_a_character_is_refused(questions: list[Question], tmp_path: Path) -> None:
    file = answer_file(tmp_path, questions, q2="half \ud83d")
    with pytest.raises(DataError, match="line 2: half a character"):
        ArchivedSystem(file, questions)


def test_empty_answers_are_answers(questions: list[Question], tmp_path: Path) -> None:
    assert ArchivedSystem(answer_file(tmp_path, questions, q1=""), questions).known()["1"].text == ""


def test_a_missing_file_is_no_model(questions: list[Question], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_system(str(tmp_path / "nope.jsonl"), questions, SAMPLING)


def test_names_must_tell_systems_apart(questions: list[Question], tmp_path: Path) -> None:
    system = ArchivedSystem(answer_file(tmp_path, questions), questions)
    with pytest.raises(InputError, match="two of the systems are called 'm'"):
        distinct([system, system])


def test_file_names() -> None:
    names = [file.name for file in answer_files(Path("run"), ["nano/almost", "nano:almost", "../x", "é"])]
    assert names == ["nano_almost-0.jsonl", "nano_almost-1.jsonl", ".._x.jsonl", "é.jsonl"]


def test_questions_come_back(tmp_path: Path) -> None:
    asked = [Question("1", "What?\u2028 ", "math", "42"), Question("a", "Who?")]
    write_rows(tmp_path / "q.jsonl", [question_line(question) for question in asked], ascii_only=True)
    assert read_questions(tmp_path / "q.jsonl") == asked


class Thinker:
    """In the place of an engine: thinks before it answers, and once for too long."""

    def stream_completions(self, prompts: list[str], params: object) -> Iterator[tuple[int, list[Completion]]]:
        texts = ["<think>hm</think>\n\nYes.", "<think>hm, hm", "No."]
        for at in range(len(prompts)):
            yield at, [Completion(texts[at % 3], (), "stop")]


@pytest.mark.parametrize("rule", ["strip", "keep", "refuse"])
def test_a_thought_is_no_answer(questions: list[Question], tmp_path: Path, rule: ReasoningRule) -> None:
    def system(name: str) -> ModelSystem:
        made = ModelSystem(name, questions[:3], dataclasses.replace(SAMPLING, reasoning=rule))
        made.engine = Thinker()
        return made

    first, second, third = system("nano/almost").write(tmp_path / "a.jsonl", Progress()).values()
    assert third.text == "No."
    assert "reasoning" not in third.metadata
    if rule == "keep":
        assert (first.text, second.text) == ("<think>hm</think>\n\nYes.", "<think>hm, hm")
        return
    assert (first.text, first.metadata["reasoning"]) == ("Yes.", "hm")
    assert (second.text, second.metadata["reasoning"]) == ("", "hm, hm")
    judge = open_judge(JudgeOptions(judge="nano"), find_data("nano", None))
    run = JudgeRun(questions[:3], "0" * 64, "nano", [system("nano/almost"), system("nano/sft")], judge)
    results, _ = run.execute(tmp_path / "run")
    reasons = [record.score.reason for record in read_samples(tmp_path / "run")]
    if rule == "strip":
        assert reasons.count("thought_cut") == 2  # both orders of the second question
        assert results["validity"]["checks"]["thought_cut"]["count"] == 2
    else:
        assert reasons.count("thought") == 4
    assert run.execute(tmp_path / "run")[0]["timing"]["samples_computed_now"] == 0  # it would come again
    assert verify_judged(tmp_path / "run").problems == []
