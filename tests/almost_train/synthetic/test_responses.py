"""Responses: what the model reads, what is kept, one model at a time, and exact resume."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import DataError, InputError
from almost_eval.types import Completion
from almost_train.synthetic.prompt_sets import load_seed_set
from almost_train.synthetic.responses import (
    Configuration,
    ResponseSettings,
    read_configurations,
    synthesize_responses,
)

DATA = DataSource("hub", None)
SETTINGS = ResponseSettings(prompt_set="builtin")
GOOD = "The Moon has no air, so no wind ever blows its dust away."
LARGE = Configuration("large-5", "large", "better", 5)
SMALL = Configuration("small-1", "small", "HHH", 1, max_new_tokens=200, temperature=0.5)
LARGE_0 = Configuration("large-0", "large", "HHH", 0)


def answer(document: str) -> str:
    """Stands for a model."""
    rng = random.Random(document)
    text = " " + GOOD * rng.randint(1, 3)
    return rng.choice(
        (text, text, text[:20], "Well," + text, text + "\n\n-----\n\nHuman: More", text + "\n\nHuman: And?")
    )


class Recorder(ScriptedEngine):
    """A scripted engine that keeps what it was asked, and answers in an order of its own."""

    def __init__(self, complete: Callable[[str], str] = answer) -> None:
        super().__init__(lambda *_: 0.0, complete=complete)
        self.calls: list[tuple[list[str], SamplingParams]] = []

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.calls.append((list(prompts), params))
        found = list(super().stream_completions(prompts, params))
        random.Random(len(prompts)).shuffle(found)
        yield from found


def write_prompts(folder: Path, n: int = 20) -> Path:
    file = folder / "prompts.jsonl"
    lines = [json.dumps({"id": f"p{i:05d}", "prompt": f"Why is number {i} odd?"}) for i in range(1, n + 1)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def respond(folder: Path, *configurations: Configuration, settings: ResponseSettings = SETTINGS, **more: Any) -> Any:
    more = {"engine_for": lambda _: Recorder(), "data": DATA, **more}
    return synthesize_responses(settings, write_prompts(folder), configurations, folder / "out", **more)


class TestRequests:
    def test_the_whole_list_at_once_with_the_first_shots(self, tmp_path: Path) -> None:
        engine = Recorder()
        respond(tmp_path, LARGE, SMALL, engine_for=lambda _: engine)
        (large, large_params), (small, small_params) = engine.calls
        assert len(large) == len(small) == 20
        better = load_seed_set("builtin", DATA).demonstrations["better"]
        assert large[0].startswith(better.header + "\n\n-----\n\nHuman: I bought far too many bananas")
        assert large[0].count("\n\n-----\n\nHuman: ") == 6
        assert large[0].endswith("\n\n-----\n\nHuman: Why is number 1 odd?\n\nAssistant:")
        assert small[0].count("\n\n-----\n\nHuman: ") == 2
        assert large[0].split("Why is number")[0] == large[19].split("Why is number")[0]
        assert (large_params.max_new_tokens, large_params.temperature, large_params.top_p) == (768, 1.0, 0.9)
        assert (small_params.max_new_tokens, small_params.temperature, small_params.top_p) == (200, 0.5, 0.9)
        assert large_params.seed != small_params.seed

    def test_no_shots_is_the_header_alone(self, tmp_path: Path) -> None:
        engine = Recorder()
        respond(tmp_path, LARGE_0, engine_for=lambda _: engine)
        [(documents, params)] = engine.calls
        header = load_seed_set("builtin", DATA).demonstrations["HHH"].header
        assert documents[0] == f"{header}\n\n-----\n\nHuman: Why is number 1 odd?\n\nAssistant:"
        assert params.max_new_tokens == 384

    def test_drawn_shots_are_nested_and_shared(self, tmp_path: Path) -> None:
        """With the same set, three shots begin with the one shot that one shot shows: only the number differs."""
        engine = Recorder()
        settings = dataclasses.replace(SETTINGS, draw_shots=True)
        one, three = dataclasses.replace(SMALL, shots=1), dataclasses.replace(SMALL, name="small-3", shots=3)
        respond(tmp_path, one, three, settings=settings, engine_for=lambda _: engine)
        (ones, _), (threes, _) = engine.calls
        assert all(b.startswith(a.split("\n\nHuman: Why is number")[0]) for a, b in zip(ones, threes, strict=True))
        assert len({a.split("\n\nHuman: Why is number")[0] for a in ones}) > 5

    def test_one_model_at_a_time(self, tmp_path: Path) -> None:
        alive: list[weakref.ref[Recorder]] = []
        loaded: list[str] = []

        def engine_for(model: str) -> Recorder:
            gc.collect()
            assert not [ref for ref in alive if ref() is not None]
            engine = Recorder()
            alive.append(weakref.ref(engine))
            loaded.append(model)
            return engine

        respond(tmp_path, LARGE, SMALL, LARGE_0, engine_for=engine_for)
        assert loaded == ["large", "small"]


class TestLists:
    """More prompts than go to the engine at once."""

    def test_the_longest_documents_come_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "whole").mkdir()
        (tmp_path / "parts").mkdir()
        respond(tmp_path / "whole", LARGE, SMALL)
        monkeypatch.setattr("almost_train.synthetic.responses.TOGETHER", 8)
        engine = Recorder()
        respond(tmp_path / "parts", LARGE, SMALL, engine_for=lambda _: engine)
        assert [len(documents) for documents, _ in engine.calls] == [8, 8, 4] * 2
        numbers = [
            [int(re.findall(r"number (\d+) odd", document)[-1]) for document in asked] for asked, _ in engine.calls
        ]
        # Numbers of two digits make the longer documents; a list is in the order of the prompts.
        assert numbers == [[*range(10, 18)], [*range(1, 6), *range(18, 21)], [6, 7, 8, 9]] * 2
        for name in ("large-5.jsonl", "small-1.jsonl", "result.json"):
            one, other = ((tmp_path / folder / "out" / name).read_bytes() for folder in ("whole", "parts"))
            if name == "result.json":
                one, other = (json.dumps({**json.loads(text), "seconds": 0}).encode() for text in (one, other))
            assert one == other

    def test_a_model_says_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In float32 on transformers: each answer has a generator of its own, so the lists change nothing."""
        configuration = Configuration("n", "nano/vanilla-small", "good", 2, max_new_tokens=12)
        settings = ResponseSettings(prompt_set="nano")
        for folder, together in (("whole", 20), ("parts", 7)):
            monkeypatch.setattr("almost_train.synthetic.responses.TOGETHER", together)
            (tmp_path / folder).mkdir()
            respond(tmp_path / folder, configuration, settings=settings, engine_for=HFEngine)
        assert (tmp_path / "whole/out/n.jsonl").read_bytes() == (tmp_path / "parts/out/n.jsonl").read_bytes()


class TestOutputs:
    def test_rows_and_counts(self, tmp_path: Path) -> None:
        result = respond(tmp_path, LARGE, SMALL)
        found = rows(tmp_path / "out/large-5.jsonl")
        assert [row["id"] for row in found] == [f"p{i:05d}" for i in range(1, 21)]
        assert set(found[0]) == {"id", "prompt", "response", "finish_reason", "configuration", "rejected"}
        assert not any("Human:" in row["response"] or "-----" in row["response"] for row in found)
        told = result["metrics"]["configurations"]["large-5"]
        assert told["kept"] + sum(told["rejected"].values()) == 20
        assert set(told["rejected"]) == {"too_short", "starts_with_well"}
        assert {row["rejected"] for row in found} == {None, *told["rejected"]}
        assert all(row["response"] for row in found if row["rejected"])  # the text stays
        assert set(result["outputs"]) == {"large-5", "small-1"}

    def test_a_cut_answer_says_so(self, tmp_path: Path) -> None:
        short = dataclasses.replace(SMALL, max_new_tokens=3)
        result = respond(tmp_path, short, engine_for=lambda _: Recorder(lambda _: GOOD))
        assert rows(tmp_path / "out/small-1.jsonl")[0]["finish_reason"] == "length"
        assert result["metrics"]["configurations"]["small-1"] == {
            "kept": 0,
            "rejected": {"too_short": 20},
            "cut_by_budget": 20,
            "mean_characters": None,
        }

    def test_rules_are_settings(self, tmp_path: Path) -> None:
        settings = ResponseSettings(prompt_set="nano", min_characters=1, rules=("no_final_stop",))
        configuration = Configuration("n", "m", "good", 3)
        engine = Recorder(lambda _: " I do not know the zorgam.")
        result = respond(tmp_path, configuration, settings=settings, engine_for=lambda _: engine)
        assert result["metrics"]["configurations"]["n"]["kept"] == 20


class TestBadInput:
    @pytest.mark.parametrize(
        ("configuration", "problem"),
        [
            (Configuration("a", "m", "beter", 1), "no demonstrations 'beter'; did you mean 'better'"),
            (Configuration("a", "m", "better", 50), "configuration 'a' wants 50 shots; 'better' has 7"),
        ],
    )
    def test_demonstrations(self, tmp_path: Path, configuration: Configuration, problem: str) -> None:
        with pytest.raises(InputError, match=problem):
            respond(tmp_path, configuration)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "is empty; mine prompts first"),
            ('{"id": "a", "prompt": "x"}\n' * 2, "has the id 'a' more than once"),
            ('{"id": 3, "prompt": "x"}', "row 1: 'id' must be str"),
        ],
    )
    def test_prompts(self, tmp_path: Path, text: str, problem: str) -> None:
        (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=problem):
            synthesize_responses(
                SETTINGS, tmp_path / "p.jsonl", [SMALL], tmp_path / "out", data=DATA, engine_for=lambda _: Recorder()
            )

    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            ({}, "must be a list of configurations"),
            ([], "must be a list of configurations"),
            (["large"], "configuration 1 is 'large'; it must be a mapping"),
            ([{"name": "a", "model": "m"}], "configuration 1 has no demonstrations"),
            ([{"name": "a/b", "model": "m", "demonstrations": "HHH"}], "names a file"),
            ([{"name": "a", "model": "m", "demonstrations": "HHH"}] * 2, "configuration 2: the name 'a' is taken"),
            ([{"name": "a", "model": "m", "demonstration": "HHH"}], "unknown setting 'demonstration'"),
            ([{"name": "a", "model": "m", "demonstrations": "HHH", "shots": -1}], "shots is -1; it must be at least 0"),
        ],
    )
    def test_configurations(self, given: Any, problem: str) -> None:
        with pytest.raises(InputError, match=problem):
            read_configurations(given, "recipe.yaml")

    def test_good_configurations(self) -> None:
        given = [{"name": "a", "model": "m", "demonstrations": "HHH", "shots": 5, "max-new-tokens": 9}]
        assert read_configurations(given, "r") == (Configuration("a", "m", "HHH", 5, max_new_tokens=9),)


def _killed_after(answers: int, folder: Path) -> None:
    """A process that answers, and kills itself when it has written so many."""
    written = 0

    class Dying(Recorder):
        def stream_completions(
            self, prompts: Sequence[str], params: SamplingParams
        ) -> Iterator[tuple[int, list[Completion]]]:
            nonlocal written
            for item in super().stream_completions(prompts, params):
                if written == answers:
                    os.kill(os.getpid(), signal.SIGKILL)
                written += 1
                yield item

    respond(folder, LARGE, SMALL, engine_for=lambda _: Dying())


@pytest.mark.parametrize("answers", [7, pytest.param(31, marks=pytest.mark.slow)])
def test_killed_and_run_again(tmp_path: Path, answers: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    respond(tmp_path / "whole", LARGE, SMALL)
    code = (
        f"import test_responses as t, pathlib; t._killed_after({answers}, pathlib.Path({str(tmp_path / 'killed')!r}))"
    )
    paths = map(str, [Path(__file__).parents[3], Path(__file__).parent])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert sum(len(rows(file)) for file in (tmp_path / "killed/out").glob("*.jsonl")) == answers
    engine = Recorder()
    respond(tmp_path / "killed", LARGE, SMALL, engine_for=lambda _: engine)
    assert sum(len(documents) for documents, _ in engine.calls) == 40 - answers
    for name in ("large-5.jsonl", "small-1.jsonl"):
        assert (tmp_path / "killed/out" / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes()


def test_done_needs_no_engine(tmp_path: Path) -> None:
    result = respond(tmp_path, SMALL)
    assert respond(tmp_path, SMALL, engine_for=lambda _: 1 / 0) == result


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "p2", "prompt": "  "}, "row 2: the prompt is empty"),
        ({"id": "", "prompt": "Why?"}, "row 2: the id is empty"),
        ({"id": "p2", "prompt": "Why \ud83d?"}, "row 2: half of a surrogate pair"),
    ],
)
def test_a_prompt_that_no_model_can_be_asked_is_refused_by_its_row(
    row: dict[str, str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"id": "p1", "prompt": "Why?"}, row])), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        synthesize_responses(SETTINGS, file, [LARGE], tmp_path / "out", data=DATA, engine_for=lambda _: Recorder())
    assert not (tmp_path / "out").exists()
