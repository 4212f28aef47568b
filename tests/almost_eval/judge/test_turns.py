"""Questions of several turns: read from files, answered turn by turn, and not lost when a process is killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource, find_data
from almost_eval.errors import DataError, InputError, StoreError
from almost_eval.files import write_rows
from almost_eval.judge.answers import ArchivedSystem, digest_answers, question_line
from almost_eval.judge.fastchat import TEMPERATURES
from almost_eval.judge.lines import couples, solos
from almost_eval.judge.model_system import ModelSystem, Sampling
from almost_eval.judge.questions import answer_line, find_questions, read_answers, read_questions, truncate_answers
from almost_eval.judge.records import Answer, AnswerTurn, Question, QuestionTurn
from almost_eval.progress import Progress
from almost_eval.types import Completion

NOWHERE = DataSource("hub", None)
THREE = Question("7", "One?", "math", "1", (QuestionTurn("Two?"), QuestionTurn("Three?", "3")))


def jsonl(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def row(**more: Any) -> dict[str, Any]:
    return {"question_id": 7, "category": "math", "turns": ["One?", "Two?", "Three?"]} | more


# --- questions


def test_any_number_of_turns(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "q.jsonl", row(reference=["1", None, "3"]), row(question_id=8, turns=["Only?"]))
    questions = read_questions(file)
    assert questions == [THREE, Question("8", "Only?", "math")]
    assert questions[0].turns == ("One?", "Two?", "Three?")
    assert questions[0].references == ("1", None, "3")
    write_rows(tmp_path / "again.jsonl", map(question_line, questions), ascii_only=True)
    assert read_questions(tmp_path / "again.jsonl") == questions


def test_mt_bench_whole(data_root: Path) -> None:
    file = data_root.parent / "mt_bench" / "question.jsonl"
    if not file.is_file():
        pytest.skip(f"no MT-Bench questions at {file}")
    questions = read_questions(file)
    assert {len(question.turns) for question in questions} == {2}
    assert questions[0].turns[1] == "Rewrite your previous response. Start every sentence with the letter A."
    by_id = {question.id: question for question in questions}
    assert by_id["104"].references[1] == "David has one brother."
    assert by_id["81"].references == (None, None)
    assert set(TEMPERATURES) - {"arena-hard-200"} == {question.category for question in questions}


def test_one_turn_has_the_digest_it_had(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", {"question_id": 7, "text": "One?", "category": "math"})
    questions, digest = find_questions(one, NOWHERE)
    # Made before there were turns: run folders and certificates have it.
    assert digest == "5663b3cd2c71ad9a794421737b979e0362c4c6f19720b5dd5b1173c54589e2e1"
    file = jsonl(tmp_path / "q.jsonl", row())
    whole, other = find_questions(file, NOWHERE)
    assert other != digest
    assert find_questions(file, NOWHERE, turns=1) == (questions, digest)
    assert find_questions(file, NOWHERE, turns=2)[0][0].turns == ("One?", "Two?")
    assert find_questions(file, NOWHERE, turns=9)[0] == whole


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (row(turns=["One?", ""]), "no question in"),
        (row(turns=["One?", 2]), "no question in"),
        (row(reference=["1", 2]), "must be text"),
        (row(reference=["1", "2", "3", "4"]), "more references than turns"),
        (row(turns=["One?", "\ud83d"]), "half a character"),
    ],
)
def test_malformed_turns(line: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem):
        read_questions(jsonl(tmp_path / "q.jsonl", line))


def test_reference_answers_of_a_file(tmp_path: Path) -> None:
    questions = jsonl(tmp_path / "q.jsonl", row(reference=["old", "old", "old"]), row(question_id=8))
    reference = {"question_id": 7, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["a", "b", "c"]}]}
    file = jsonl(tmp_path / "gpt-4.jsonl", reference, {**reference, "question_id": 900})
    first, second = find_questions(questions, NOWHERE, reference=str(file))[0]
    assert first.references == ("a", "b", "c")
    assert second.references == (None, None, None)
    short = jsonl(tmp_path / "short.jsonl", {**reference, "choices": [{"turns": ["a"]}]})
    with pytest.raises(DataError, match="question 7 has 3 turns, and 1 of them answered"):
        find_questions(questions, NOWHERE, reference=str(short))
    other = jsonl(tmp_path / "other.jsonl", {**reference, "question_id": 900})
    with pytest.raises(InputError, match="answers none of these questions"):
        find_questions(questions, NOWHERE, reference=str(other))


# --- answer files


def three(*texts: str, model: str = "m") -> dict[str, Any]:
    return {"question_id": 7, "answer_id": "x", "model_id": model, "choices": [{"index": 0, "turns": list(texts)}]}


def test_answers_as_fastchat_writes_them(tmp_path: Path) -> None:
    _, answers = read_answers(jsonl(tmp_path / "a.jsonl", three("a", "", "c", "d")), [THREE])
    assert answers["7"].turns == ("a", "", "c")
    line = answer_line(answers["7"], THREE)
    assert "text" not in line
    assert line["choices"] == [{"index": 0, "turns": ["a", "", "c"]}]
    noted = answers["7"].of_turns(
        [AnswerTurn("a", {"finish_reason": "stop"}), AnswerTurn("b"), AnswerTurn("c", {"n": 1})]
    )
    assert read_answers(jsonl(tmp_path / "b.jsonl", answer_line(noted, THREE)), [THREE])[1] == {"7": noted}
    assert digest_answers({"7": noted}) != digest_answers(answers)
    # Less turns are asked: the rest is passed over.
    first = dataclasses.replace(THREE, later=())
    assert read_answers(tmp_path / "a.jsonl", [first])[1]["7"].turns == ("a",)


def test_too_few_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"question 7 has 3 turns, and 2 of them answered; .* or --turns 2"):
        read_answers(jsonl(tmp_path / "a.jsonl", three("a", "b")), [THREE])
    with pytest.raises(DataError, match="3 turns, and 1 of them"):
        read_answers(jsonl(tmp_path / "b.jsonl", {"question_id": 7, "text": "a"}), [THREE])
    with pytest.raises(DataError, match="an answer to a later turn is no text"):
        read_answers(jsonl(tmp_path / "c.jsonl", {"question_id": 7, "choices": [{"turns": ["a", 2, "c"]}]}), [THREE])


def test_thoughts_and_lengths_of_every_turn(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", three("a", "<think>hm</think>b", "ccc"))
    system = ArchivedSystem(file, [THREE])
    assert system.known()["7"].turns == ("a", "b", "ccc")
    assert [about.get("reasoning") for about in system.known()["7"].turn_metadata] == [None, "hm", None]
    with pytest.raises(InputError, match=r"longer than 2 characters \(question 7; the longest has 3"):
        ArchivedSystem(file, [THREE], limit=2)
    cut, n = truncate_answers(system.known(), 2)
    assert (cut["7"].turns, n) == (("a", "b", "cc"), 1)
    assert cut["7"].turn_metadata[2]["cut_from_characters"] == 3


def test_each_turn_is_a_case() -> None:
    questions = [Question("1", "Only?"), THREE]
    mine, other = (
        {"1": Answer("1", "x", name), "7": Answer("7", "a", name, {}, (AnswerTurn("bb"), AnswerTurn("cccc")))}
        for name in ("ours", "base")
    )
    ids, pairs, cuts = couples(questions, [other, mine], "both", 3)
    assert ids == ["1/forward", "1/reverse", "7/forward", "7/reverse"] + [
        f"7/{order}/turn {turn}" for turn in (2, 3) for order in ("forward", "reverse")
    ]
    assert [pair.turn for pair in pairs] == [1, 1, 1, 1, 2, 2, 3, 3]
    assert cuts == [(0, 0)] * 6 + [(1, 1)] * 2
    ids, *_ = solos(questions, [mine], None)
    assert ids == ["1/turn 1", "7/turn 1", "7/turn 2", "7/turn 3"]
    assert solos(questions, [mine, other], None)[0][-1] == "7/turn 3/base"


# --- a model's answers


SAMPLING = Sampling(max_new_tokens=32)


@pytest.fixture(scope="module")
def dialogues() -> list[Question]:
    """Six questions of the nano world's, as one of a turn, one of three, and one of two."""
    texts = [question.text for question in find_questions(None, find_data("nano", None), limit=6)[0]]
    two = dataclasses.replace(THREE, id="2", text=texts[1], later=tuple(map(QuestionTurn, texts[2:4])))
    return [Question("1", texts[0]), two, Question("3", texts[4], "writing", None, (QuestionTurn(texts[5]),))]


@pytest.fixture(scope="module")
def written(dialogues: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nano/almost answers when nothing disturbs it."""
    file = tmp_path_factory.mktemp("written") / "almost.jsonl"
    ModelSystem("nano/almost", dialogues, SAMPLING).write(file, Progress())
    return file


def rows(file: Path) -> dict[Any, Any]:
    return {line["question_id"]: line for line in map(json.loads, file.read_text().splitlines())}


class Echo:
    """In the place of an engine: says its prompt, and how it was to sample; kills its process after some answers."""

    def __init__(self, text: str = "{}", stop_after: int | None = None) -> None:
        self.text, self.left = text, stop_after
        self.prompts: list[str] = []
        self.temperatures: list[float] = []

    def stream_completions(self, prompts: list[str], params: Any) -> Iterator[tuple[int, list[Completion]]]:
        for at, prompt in enumerate(prompts):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.prompts.append(prompt)
            self.temperatures.append(params.temperature)
            yield at, [Completion(self.text.format(len(self.prompts)), (), "stop")]


def system(questions: list[Question], engine: Echo, **more: Any) -> ModelSystem:
    made = ModelSystem("nano/almost", questions, dataclasses.replace(SAMPLING, template="vicuna", **more))
    made.engine = engine
    return made


def test_lines_of_several_turns(written: Path, dialogues: list[Question]) -> None:
    lines = rows(written)
    assert set(lines[1]) == {"question_id", "text", "answer_id", "model_id", "metadata"}
    assert len(lines[2]["choices"][0]["turns"]) == 3
    assert len(lines[3]["choices"][0]["turns"]) == 2
    assert [about["finish_reason"] for about in lines[2]["metadata"]["later_turns"]] == ["stop"] * 2
    assert not written.with_suffix(".turns").exists()
    assert read_answers(written, dialogues)[0] == "nano/almost"


def test_a_turn_follows_the_models_own_answer(dialogues: list[Question], tmp_path: Path) -> None:
    engine = Echo("<think>hm {0}</think>said {0}")
    answers = system(dialogues[2:], engine).write(tmp_path / "a.jsonl", Progress())
    first, second = dialogues[2].turns
    assert engine.prompts[0].endswith(f"USER: {first} ASSISTANT:")
    assert engine.prompts[1].startswith(engine.prompts[0] + " said 1")
    assert engine.prompts[1].endswith(f"USER: {second} ASSISTANT:")
    assert "hm" not in engine.prompts[1]
    assert answers["3"].turns == ("said 1", "said 2")
    assert answers["3"].later[0].metadata["reasoning"] == "hm 2"


def test_a_kept_thought_is_not_sent_back(dialogues: list[Question], tmp_path: Path) -> None:
    engine = Echo("<think>hm {0}</think>said {0}")
    answers = system(dialogues[2:], engine, reasoning="keep").write(tmp_path / "a.jsonl", Progress())
    assert answers["3"].turns == ("<think>hm 1</think>said 1", "<think>hm 2</think>said 2")
    assert "said 1" in engine.prompts[1]
    assert "hm" not in engine.prompts[1]


@pytest.mark.parametrize("stop_after", range(6))
def test_a_kill_between_turns_loses_no_turn(stop_after: int, dialogues: list[Question], tmp_path: Path) -> None:
    whole = Echo("said")
    expected = system(dialogues, whole).write(tmp_path / "whole.jsonl", Progress())
    assert len(whole.prompts) == 6
    file = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        system(dialogues, Echo("said", stop_after)).write(file, Progress())
    if file.with_suffix(".turns").exists():
        with file.with_suffix(".turns").open("a") as torn:
            torn.write('{"question_id": "3", "tu')
    rest = Echo("said")
    assert system(dialogues, rest).write(file, Progress()) == expected
    assert rest.prompts == whole.prompts[stop_after:]
    assert rows(file) == rows(tmp_path / "whole.jsonl")
    assert not file.with_suffix(".turns").exists()


def test_turns_that_this_run_did_not_write(dialogues: list[Question], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    turn = {"question_id": "2", "turn": 1, "text": "a", "metadata": {}}
    for lines, problem in (
        ([turn, turn], "line 2: turn 1 of question 2 is not asked, or answered twice"),
        ([turn | {"turn": 2}], "line 1: turn 2 of question 2"),
        ([turn | {"question_id": "1"}], "line 1: turn 1 of question 1 is not asked"),
        ([{"turn": 1}], "line 1 is not an answer to a turn"),
    ):
        write_rows(file.with_suffix(".turns"), lines, ascii_only=True)
        with pytest.raises(StoreError, match=problem):
            system(dialogues, Echo()).write(file, Progress())


def test_temperatures_by_category(dialogues: list[Question], tmp_path: Path) -> None:
    engine = Echo("said")
    made = system(dialogues, engine, temperatures={"math": 0.0, "writing": 0.3})
    answers = made.write(tmp_path / "a.jsonl", Progress())
    assert sorted(engine.temperatures) == [0.0, 0.0, 0.0, 0.3, 0.3, 0.7]
    assert made.spec()["sampling"]["temperatures"] == {"math": 0.0, "writing": 0.3}
    sampled = [turn["sampling"]["temperature"] for turn in answers["2"].turn_metadata]
    assert sampled == [0.0, 0.0, 0.0]
    assert answers["1"].metadata["sampling"]["temperature"] == 0.7
    assert "temperatures" not in ModelSystem("nano/almost", dialogues, SAMPLING).spec()["sampling"]


def test_a_full_context_is_no_answer(dialogues: list[Question], tmp_path: Path) -> None:
    class Long(Echo):
        context_length = 160

        @property
        def encoder(self) -> Any:
            class Words:
                def encode_texts(self, texts: list[str]) -> list[list[str]]:
                    return [text.split() for text in texts]

            return Words()

    made = system(dialogues, Long("word " * 100))
    answers = made.write(tmp_path / "a.jsonl", Progress())
    assert answers["2"].turns[1:] == ("", "")
    assert [about.get("unscored") for about in answers["2"].turn_metadata] == [None, *["context_too_long"] * 2]
    assert made.notes == [
        "nano/almost: 3 of 3 later turns have no answer, as what was said before and 32 new tokens do not fit its "
        "context; fewer --max-new-tokens leave room"
    ]


def test_without_a_template_there_is_no_dialogue(dialogues: list[Question]) -> None:
    bare = dataclasses.replace(SAMPLING, template="none")
    with pytest.raises(InputError, match="give --template, or --turns 1"):
        ModelSystem("nano/vanilla-small", dialogues, bare)
    ModelSystem("nano/vanilla-small", dialogues[:1], bare)
