"""What the model read, to the character: written once, before the first score, and small."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from almost_eval.data.sources import DataSource
from almost_eval.errors import RunError, StoreError
from almost_eval.run.prompts import (
    PROMPTS,
    SHORTEST_PIECE,
    Prompt,
    SamplePrompts,
    StoredPrompts,
    read_prompts,
    write_prompts,
)
from almost_eval.tasks.base import Prompting

Command = Callable[..., Any]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / PROMPTS).read_text(encoding="utf-8").splitlines()]


def texts(folder: Path) -> dict[str, list[str]]:
    return {id: [prompt.text for prompt in asked.prompts] for id, asked in read_prompts(folder).items()}


def test_a_shared_header_is_stored_once(tmp_path: Path) -> None:
    header = "Question. Answer.\n" * 20 + "\n"
    asked = [SamplePrompts(f"{i}", ("yes", "no"), (Prompt(f"{header}Question {i}?", (" A", " B")),)) for i in range(5)]
    asked.append(SamplePrompts("too long", (), ()))
    write_prompts(tmp_path, asked)
    first, *rest = lines(tmp_path)
    assert first["text"] == header
    assert [row["prompts"][0]["text"] for row in rest[:-1]] == [f"Question {i}?" for i in range(5)]
    assert {row["prompts"][0]["piece"] for row in rest[:-1]} == {first["piece"]}
    back = read_prompts(tmp_path)
    assert [prompt.shared for one in back.values() for prompt in one.prompts] == [len(header)] * 5
    assert back["0"] == SamplePrompts("0", ("yes", "no"), (Prompt(f"{header}Question 0?", (" A", " B"), len(header)),))
    assert back["too long"].prompts == ()


def test_a_short_beginning_stays_with_its_prompt(tmp_path: Path) -> None:
    header = "x" * (SHORTEST_PIECE - 3) + "\n\n"
    write_prompts(tmp_path, [SamplePrompts(f"{i}", (), (Prompt(header + f"{i}"),)) for i in range(2)])
    assert [row["id"] for row in lines(tmp_path)] == ["0", "1"]


ANY_TEXT = st.text(st.characters(), max_size=400)


@given(st.lists(st.tuples(ANY_TEXT, st.lists(ANY_TEXT, max_size=3)), max_size=6), ANY_TEXT)
def test_every_text_comes_back(given: list[tuple[str, list[str]]], header: str) -> None:
    asked = [
        SamplePrompts(f"{i}", tuple(c), (Prompt(header + t), Prompt(t, tuple(c)))) for i, (t, c) in enumerate(given)
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder), asked)
        back = read_prompts(Path(folder))
    assert [[p.text for p in one.prompts] for one in back.values()] == [[p.text for p in one.prompts] for one in asked]
    assert [one.choices for one in back.values()] == [one.choices for one in asked]


def test_half_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    write_prompts(tmp_path, [SamplePrompts("1", (), (Prompt("broken \ud83d end"),))])
    assert texts(tmp_path) == {"1": ["broken \ud83d end"]}


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    write_prompts(tmp_path, [SamplePrompts("1", (), (Prompt("first"),))])
    write_prompts(tmp_path, [SamplePrompts("1", (), (Prompt("second"),))])
    assert texts(tmp_path) == {"1": ["first"]}
    assert [file.name for file in tmp_path.iterdir()] == [PROMPTS]


def test_a_folder_without_prompts(tmp_path: Path) -> None:
    assert read_prompts(tmp_path) == {}


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "1"}', '{"id": "1", "choices": [], "prompts": [{"piece": "x"}]}'])
def test_a_damaged_file_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / PROMPTS).write_text(line + "\n")
    with pytest.raises(StoreError, match=r"prompts\.jsonl, line 1 is not a prompt .* remove the file"):
        read_prompts(tmp_path)


def test_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to .*; the same command goes on"):
        write_prompts(tmp_path / "file", [SamplePrompts("1", (), ())])


# --- through the command


def test_a_run_keeps_what_its_model_read(almost_eval: Command, tmp_path: Path) -> None:
    from almost_eval.data.prompt_sets import load_prompt_set
    from almost_eval.data.sources import find_data
    from almost_eval.engines.hf import HFEngine
    from almost_eval.models.chat import load_template, special_tokens
    from almost_eval.tasks.hhh import HHH

    done = almost_eval("hhh", "--limit", 3, "--output", tmp_path / "run")
    assert done.code == 0
    data = find_data("nano", None)
    engine = HFEngine("nano/almost")
    template = load_template("auto", engine.tokenizer)
    tokens = special_tokens(engine.tokenizer)
    task = HHH("choice", data, Prompting(load_prompt_set("builtin", data), template, tokens), limit=3)
    stored = read_prompts(tmp_path / "run")
    assert list(stored) == [sample.id for sample in task.samples()]  # in the order of the task
    for sample in task.samples():
        one = stored[sample.id]
        assert one.choices == sample.choices
        assert [(p.text, p.continuations) for p in one.prompts] == [
            (request.context, request.continuations) for request in task.requests(sample, 0)
        ]


def test_an_earlier_run_gets_its_prompts_when_repeated(almost_eval: Command, tmp_path: Path) -> None:
    command = ["mmlu", "--limit", 4, "--output", tmp_path / "run"]
    almost_eval(*command)
    whole = (tmp_path / "run" / PROMPTS).read_bytes()
    before = (tmp_path / "run/samples.jsonl").read_bytes(), (tmp_path / "run/results.json").read_bytes()
    (tmp_path / "run" / PROMPTS).unlink()  # as a version before this file left it
    assert almost_eval("verify", tmp_path / "run").code == 0
    assert almost_eval(*command).code == 0
    assert (tmp_path / "run" / PROMPTS).read_bytes() == whole
    assert ((tmp_path / "run/samples.jsonl").read_bytes(), (tmp_path / "run/results.json").read_bytes()) == before
    pieces = [row["text"] for row in lines(tmp_path / "run") if "piece" in row]
    subjects = {id.split("/")[0] for id in read_prompts(tmp_path / "run")}
    assert len(pieces) == len(subjects)  # the examples of a subject, once


def test_a_reward_model_reads_conversations(almost_eval: Command, tmp_path: Path) -> None:
    almost_eval("hhh", "--protocol", "reward", "--limit", 2, "--output", tmp_path / "run")
    for one in read_prompts(tmp_path / "run").values():
        assert len(one.prompts) == 2
        assert all(choice.strip() in p.text for choice, p in zip(one.choices, one.prompts, strict=True))
        assert all("\n\nHuman:" in p.text and p.continuations == () for p in one.prompts)


@pytest.mark.slow
def test_all_of_mmlu_is_no_burden(data_root: Path, tmp_path: Path) -> None:
    import time

    from almost_eval.data.prompt_sets import load_prompt_set
    from almost_eval.tasks.mmlu import MMLU

    data = DataSource("hub", data_root)
    task = MMLU([], 5, data, Prompting(load_prompt_set("builtin", data)))
    asked = [
        SamplePrompts(s.id, s.choices, tuple(Prompt(r.context, r.continuations) for r in task.requests(s, 5)))
        for s in task.samples()
    ]
    began = time.process_time()
    write_prompts(tmp_path, asked)
    seconds = time.process_time() - began
    plain = sum(len(prompt.text) for one in asked for prompt in one.prompts)
    size = (tmp_path / PROMPTS).stat().st_size
    assert len(asked) == 14_042
    assert size < 0.35 * plain
    assert seconds < 10


def test_stored_prompts_are_those_in_memory(tmp_path: Path) -> None:
    header = "Question. Answer.\n" * 20 + "\n"
    asked = [SamplePrompts(f"{i}", (), (Prompt(f"{header}ä \ud800 {i}?"),)) for i in range(5)]
    for name, samples in (
        ("a", asked),
        ("b", asked),
        ("c", asked[:4]),
        ("d", [*asked[:4], SamplePrompts("4", (), ())]),
    ):
        (tmp_path / name).mkdir()
        write_prompts(tmp_path / name, samples)
    stored = {name: StoredPrompts(tmp_path / name) for name in "abcd"}
    assert list(stored["a"]) == [one.id for one in asked]
    assert stored["a"] == read_prompts(tmp_path / "a")
    assert stored["a"] == stored["b"]
    assert stored["a"] != stored["c"]
    assert stored["a"] != stored["d"]
    assert not StoredPrompts(tmp_path)
