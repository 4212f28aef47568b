"""Prompt mining: what is read, what is rejected and why, when it stops, and exact resume."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import GenerationEngine, SamplingParams
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import InputError, RunError, StoreError
from almost_eval.types import Completion
from almost_train.common.config import settings_from
from almost_train.synthetic.prompt_sets import load_seed_set
from almost_train.synthetic.prompts import PromptSettings, read_query, request_text, synthesize_prompts

DATA = DataSource("hub", None)
SETTINGS = PromptSettings(count=40, prompt_set="builtin", round_size=8, patience=4)
WORDS = "why does every old iron bridge over cold rivers need new paint when summer storms have passed".split()


def write(prompt: str) -> str:
    """Stands for a model: an answer that depends on the shots, good, short, or a repetition."""
    rng = random.Random(prompt)
    kind = rng.random()
    if kind < 0.1:
        return " short"
    if kind < 0.2:
        return " " + prompt.split("Query: ")[1].split("\n")[0] + "\nQuery: more"
    return " " + " ".join(rng.sample(WORDS, 12)).capitalize() + "?\nQuery: another one, which is not read"


def scripted(complete: Callable[[str], str] = write) -> GenerationEngine:
    return ScriptedEngine(lambda *_: 0.0, complete=complete)


def mine(output: Path, settings: PromptSettings = SETTINGS, complete: Callable[[str], str] = write) -> dict[str, Any]:
    return synthesize_prompts(settings, "some/model", output, data=DATA, engine_for=lambda _: scripted(complete))


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class TestReading:
    @pytest.mark.parametrize(
        ("completion", "ours", "official"),
        [
            (" Why is grass green?\nQuery: How old is rock?\nQuery: x", "Why is grass green?", "How old is rock?"),
            (" Why is grass green?", "Why is grass green?", ""),
            (" Why? query : Who?\n Query: What? QUERY:  Where?", "Why?", "What?"),
            ("\n\nQuery: Why?", "", "Why?"),
            ("", "", ""),
        ],
    )
    def test_which_query(self, completion: str, ours: str, official: str) -> None:
        assert read_query(completion, "completion") == ours
        assert read_query(completion, "official") == official

    def test_request(self) -> None:
        assert request_text("Ask.", ["Why?", "Who?"]) == "Ask.\n\nQuery: Why?\nQuery: Who?\nQuery:"
        assert request_text("", ["Why?"]) == "Query: Why?\nQuery:"


class TestMining:
    def test_outputs(self, tmp_path: Path) -> None:
        result = mine(tmp_path / "out")
        found, rejected = rows(tmp_path / "out/prompts.jsonl"), rows(tmp_path / "out/prompts.rejected.jsonl")
        assert [row["id"] for row in found] == [f"p{i:05d}" for i in range(1, 41)]
        assert len({row["prompt"] for row in found}) == 40
        metrics = result["metrics"]
        assert metrics["prompts"] == 40
        assert metrics["candidates"] == 40 + len(rejected) == 8 * metrics["rounds"]
        assert metrics["rejected"] == {
            reason: sum(row["reason"] == reason for row in rejected) for reason in {r["reason"] for r in rejected}
        }
        assert {"too_short", "overlap"} <= set(metrics["rejected"])
        nearest = next(row for row in rejected if row["reason"] == "overlap")
        assert 0.5 <= nearest["score"] <= 1
        assert nearest["nearest"]
        assert not list((tmp_path / "out").glob(".rounds*"))

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "empty"),
            ("\n", "empty"),
            ("a question of 29 characters !", None),
            ("a question of 29 characters  a", None),
            ("a question of 28 characters", "too_short"),
            ("why " * 61 + "rain?", None),
            ("why " * 62 + "rain?", "too_long"),
            (" ".join(f"w{i}" for i in range(70)), "unfinished"),
        ],
    )
    def test_rules(self, tmp_path: Path, text: str, reason: str | None) -> None:
        settings = dataclasses.replace(SETTINGS, count=1, round_size=1, max_rounds=1, accept_fewer=True)
        if reason is None:
            assert mine(tmp_path / "out", settings, lambda _: text)["metrics"]["prompts"] == 1
        else:
            with pytest.raises(RunError, match=rf"after 1 rounds with 0 of 1 prompts \(rejected: {reason} 1\)"):
                mine(tmp_path / "out", settings, lambda _: text)

    def test_shots_come_from_seeds_and_from_what_was_found(self, tmp_path: Path) -> None:
        asked: list[str] = []

        def complete(prompt: str) -> str:
            asked.append(prompt)
            return write(prompt)

        mine(tmp_path / "out", complete=complete)
        seeds = load_seed_set("builtin", DATA)
        found = {row["prompt"] for row in rows(tmp_path / "out/prompts.jsonl")}
        shots = [[line.removeprefix("Query: ") for line in prompt.split("\n")[2:-1]] for prompt in asked]
        assert all(prompt.startswith(seeds.instruction + "\n\nQuery: ") for prompt in asked)
        assert all(len(drawn) == len(set(drawn)) == 10 for drawn in shots)
        assert {shot for drawn in shots[:8] for shot in drawn} <= set(seeds.seed_prompts)
        assert {shot for drawn in shots for shot in drawn} & found

    def test_another_seed_draws_other_shots(self, tmp_path: Path) -> None:
        mine(tmp_path / "a")
        mine(tmp_path / "b", dataclasses.replace(SETTINGS, seed=1))
        assert (tmp_path / "a/prompts.jsonl").read_bytes() != (tmp_path / "b/prompts.jsonl").read_bytes()

    def test_stops_where_nothing_new_comes(self, tmp_path: Path) -> None:
        same = "Which of the two bridges is the older one, and why?"
        with pytest.raises(RunError, match=r"after 5 rounds with 1 of 40 prompts \(rejected: overlap 39\)"):
            mine(tmp_path / "out", complete=lambda _: same)
        with pytest.raises(RunError, match="--accept-fewer"):  # again, with no engine at all
            synthesize_prompts(SETTINGS, "some/model", tmp_path / "out", data=DATA, engine_for=lambda _: scripted(str))
        fewer = dataclasses.replace(SETTINGS, accept_fewer=True)
        assert mine(tmp_path / "fewer", fewer, lambda _: same)["metrics"]["prompts"] == 1

    def test_bad_input(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--shots 500 is more than the 105 seed prompts of 'builtin'"):
            mine(tmp_path / "out", dataclasses.replace(SETTINGS, shots=500))
        assert not (tmp_path / "out").exists()
        mine(tmp_path / "out")
        with pytest.raises(StoreError, match="made with other settings"):
            mine(tmp_path / "out", dataclasses.replace(SETTINGS, seed=7))

    def test_official_defaults(self) -> None:
        settings = settings_from(PromptSettings, {}, "recipe")
        assert (settings.shots, settings.temperature, settings.top_p, settings.max_new_tokens) == (10, 1.2, 0.9, 64)
        assert (settings.overlap, settings.min_characters, settings.max_characters) == (0.5, 30, 250)


class Backwards:
    """Gives completions in the opposite order, and records the seeds."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.seeds.append(params.seed)
        yield from reversed(list(scripted().stream_completions(prompts, params)))

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        raise NotImplementedError


def test_the_order_of_an_engine_changes_nothing(tmp_path: Path) -> None:
    mine(tmp_path / "a")
    engine = Backwards()
    synthesize_prompts(SETTINGS, "some/model", tmp_path / "b", data=DATA, engine_for=lambda _: engine)
    for name in ("prompts.jsonl", "prompts.rejected.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(set(engine.seeds)) == len(engine.seeds) > 3


def _killed_in_round(number: int, output: Path) -> None:
    """A process that mines, and kills itself in the middle of a round."""
    calls = 0

    def complete(prompt: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 8 * number - 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(prompt)

    mine(output, complete=complete)


@pytest.mark.parametrize("number", [1, 3])
def test_killed_and_run_again(tmp_path: Path, number: int) -> None:
    mine(tmp_path / "whole")
    code = f"import test_prompts as t, pathlib; t._killed_in_round({number}, pathlib.Path({str(tmp_path / 'out')!r}))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parents[3], Path(__file__).parent])),
    }
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    journal = tmp_path / "out/.rounds.jsonl"
    assert len(rows(journal)) == number - 1
    answers = rows(tmp_path / "out/.answers.jsonl")  # four were finished before the one in which it was killed
    assert [(row["round"], row["request"]) for row in answers] == [(number, i) for i in range(4)]
    with journal.open("a") as stream:  # a line cut short, as a full disk leaves it
        stream.write('{"round": 9, "new"')
    calls: list[str] = []
    mine(tmp_path / "out", complete=lambda prompt: calls.append(prompt) or write(prompt))  # type: ignore[func-returns-value]
    assert len(calls) % 8 == 4  # whole rounds, and what was missing of the one that was killed
    assert not list((tmp_path / "out").glob(".answers*"))
    for name in ("prompts.jsonl", "prompts.rejected.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    before = (tmp_path / "out/result.json").read_bytes()
    synthesize_prompts(SETTINGS, "some/model", tmp_path / "out", data=DATA, engine_for=lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    assert (tmp_path / "out/result.json").read_bytes() == before
