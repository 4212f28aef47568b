"""Self-play: what models are asked, which candidate wins, when a dialogue ends, and the same bytes after a kill."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import DataError, InputError, StoreError
from almost_eval.files import read_rows
from almost_eval.types import Completion, Conversation, Message
from almost_train.pipeline.summary import outcome
from almost_train.self_play.rules import broken_rule, end_at_user, repeats_itself, says_goodbye
from almost_train.self_play.run import self_play
from almost_train.self_play.turns import SelfPlaySettings
from almost_train.synthetic.prompt_sets import DemonstrationSet

GOODBYES = SelfPlaySettings().goodbyes
OUTPUTS = ("demonstrations", "demonstrations.rejected", "candidates", "user_turns")
QUESTION = "Where is the river?"


def talk(*turns: str) -> Conversation:
    return tuple(Message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns))


DEMONSTRATIONS = {
    "HHH": DemonstrationSet("Dialogues with a helpful assistant.", (talk("Hi.", "Hello!"), talk("Why?", "Because."))),
    "plain": DemonstrationSet("", (talk("Hi.", "Hello!"),)),
}


class Actors(ScriptedEngine):
    """Answers from `answers` (one for each candidate) at an assistant's turn and from `asks` at a user's."""

    def __init__(self, answers: Sequence[str], asks: Callable[[str], str] = lambda _: " Why?", die_after: int = 0):
        super().__init__(lambda *_: 0.0)
        self.answers, self.asks = answers, asks
        self.calls: list[tuple[list[str], SamplingParams]] = []
        self.die_after = die_after

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        return [said for _, said in sorted(self.stream_completions(prompts, params))]

    def stream_completions(
        self, prompts: Sequence[str], params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.calls.append((list(prompts), params))
        for index in reversed(range(len(prompts))):  # any order will do
            prompt = prompts[index]
            at_user = prompt.endswith("\n\nHuman:")
            texts = [self.asks(prompt)] if at_user else [f"{a} {prompt.count('Human:')}." for a in self.answers]
            yield index, [Completion(text, (), "stop") for text in texts[: params.n]]
            self.die_after -= 1
            if self.die_after == 0:
                raise KeyboardInterrupt


class Judge:
    """A reward from the last answer."""

    def __init__(self, reward: Callable[[str], float] = lambda answer: float(len(answer))) -> None:
        self.reward = reward
        self.seen: list[Conversation] = []

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        self.seen += conversations
        return [self.reward(conversation[-1].content) for conversation in conversations]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"{QUESTION[:-1]} {i}?"}) + "\n" for i in range(3)))
    return file


SETTINGS = SelfPlaySettings(
    assistant_model="a", user_model="a", shots=1, candidates=3, max_turns=2, max_new_tokens=40, user_max_new_tokens=20
)


def play(prompts: Path, output: Path, engine: Any, judge: Any = None, **changes: Any) -> dict[str, Any]:
    settings = replace(SETTINGS, **changes)
    return self_play(
        settings,
        prompts,
        None if judge is None else "rm",
        output,
        engine_for=lambda _: engine,
        demonstrations=DEMONSTRATIONS,
        reward_for=lambda _: judge,
    )


# --- what is asked, and what is kept ---


def test_the_best_candidate_goes_on_and_everything_is_written(prompts: Path, tmp_path: Path) -> None:
    engine, judge = (
        Actors([" No", " The long way round", " South"], lambda prompt: f" And {prompt.count('Human')}?"),
        Judge(),
    )
    result = play(prompts, tmp_path / "out", engine, judge)
    rows = {name: read_rows(tmp_path / "out" / f"{name}.jsonl") for name in OUTPUTS}
    # One call for a turn of all dialogues; the prompt is header, one shot, the dialogue, the marker of the turn.
    assert [len(texts) for texts, _ in engine.calls] == [3, 3, 3]
    shots = "Dialogues with a helpful assistant.\n\n-----\n\nHuman: Hi.\n\nAssistant: Hello!\n\n-----"
    first = f"{shots}\n\nHuman: Where is the river 0?\n\nAssistant:"
    assert engine.calls[0][0][0] == first
    assert engine.calls[1][0][0] == f"{first} The long way round 2.\n\nHuman:"
    assert [params.n for _, params in engine.calls] == [3, 1, 3]
    assert len({params.seed for _, params in engine.calls}) == 3
    # The longest answer wins both turns; the reward is of the whole conversation, the demonstrations left out.
    assert rows["demonstrations"][0] == {
        "id": "p0",
        "messages": [
            m.to_dict()
            for m in talk("Where is the river 0?", "The long way round 2.", "And 3?", "The long way round 3.")
        ],
        "rewards": [21.0, 21.0],
        "ended": "max_turns",
    }
    assert judge.seen[9] == talk("Where is the river 0?", "The long way round 2.", "And 3?", "No 3.")
    assert [row["id"] for row in rows["demonstrations"]] == ["p0", "p1", "p2"]
    assert rows["candidates"][0]["chosen"] == 1
    assert rows["candidates"][0]["candidates"][2] == {
        "text": "South 2.", "finish_reason": "stop", "reward": 8.0, "rejected": None
    }  # fmt: skip
    assert len(rows["candidates"]) == 6
    assert rows["user_turns"][0] == {"id": "p0", "turn": 1, "text": "And 3?", "finish_reason": "stop", "ended": None}
    assert result["metrics"]["reward"]["chosen"] == 21.0
    assert result["metrics"]["reward"]["first_valid"] == 5.0
    assert result["metrics"]["ended"] == {"max_turns": 3}
    assert not (tmp_path / "out" / "turns.jsonl").exists()


def test_what_the_token_budget_cut_is_counted(prompts: Path, tmp_path: Path) -> None:
    engine = Actors([" No", " The long way round", " South"], lambda prompt: f" And {prompt.count('Human')}?")
    say = engine.stream_completions

    def cut(texts: Sequence[str], params: SamplingParams) -> Iterator[tuple[int, list[Completion]]]:
        # Every third candidate, and the turn of one user of three, ends at the limit.
        for index, completions in say(texts, params):
            if params.n > 1 or index == 0:
                completions[-1] = replace(completions[-1], finish_reason="length")
            yield index, completions

    engine.stream_completions = cut  # type: ignore[method-assign, assignment]
    metrics = play(prompts, tmp_path / "out", engine, Judge())["metrics"]
    # 3 dialogues in the first turn, of which the cut user turn ends one: 3 + 2 assistant turns of 3 candidates each.
    assert (metrics["candidates"], metrics["cut_by_budget"]) == (15, {"candidates": 5, "user_turns": 1})
    assert outcome("self_play", metrics).endswith(
        ", 5 candidates cut at the limit of new tokens, 1 user turns cut at the limit of new tokens"
    )


def test_unguided_keeps_the_first_valid_of_the_same_candidates(prompts: Path, tmp_path: Path) -> None:
    engine = Actors([" ", " Short", " The long way round"])
    play(prompts, tmp_path / "with", engine, Judge(), unguided=True, max_turns=1)
    guided = Actors([" ", " Short", " The long way round"])
    play(prompts, tmp_path / "guided", guided, Judge(), max_turns=1)
    play(prompts, tmp_path / "without", engine, None, unguided=True, max_turns=1)
    assert engine.calls[0] == guided.calls[0]  # paired: the same prompts, the same seed
    chosen = {n: read_rows(tmp_path / n / "candidates.jsonl")[0]["chosen"] for n in ("with", "guided", "without")}
    assert chosen == {"with": 0, "guided": 2, "without": 0}
    assert read_rows(tmp_path / "with" / "demonstrations.jsonl")[0]["rewards"] == [2.0]  # "2."
    assert read_rows(tmp_path / "without" / "demonstrations.jsonl")[0]["rewards"] == [None]


def test_of_equal_candidates_the_first_wins_and_without_a_number_none_does(prompts: Path, tmp_path: Path) -> None:
    play(prompts, tmp_path / "tie", Actors([" One", " Two", " Six"]), Judge(lambda _: 1.0), max_turns=1)
    assert read_rows(tmp_path / "tie" / "candidates.jsonl")[0]["chosen"] == 0
    nan = Judge(lambda answer: math.nan if "One" in answer else -1.0)
    result = play(prompts, tmp_path / "nan", Actors([" One", " Two", " Six"]), nan, max_turns=1)
    assert read_rows(tmp_path / "nan" / "candidates.jsonl")[0]["chosen"] == 1
    assert result["metrics"]["rejected_candidates"] == {"non_finite_reward": 3}


def test_a_dialogue_ends_where_no_candidate_is_left(prompts: Path, tmp_path: Path) -> None:
    # From the second turn on (the third "Human:") every answer opens a turn of its own.
    class Rambler(Actors):
        def stream_completions(self, prompts: Sequence[str], params: SamplingParams) -> Any:
            for index, said in super().stream_completions(prompts, params):
                late = prompts[index].count("Human:") == 3 and not prompts[index].endswith("Human:")
                yield index, [replace(c, text=c.text + "\nHuman: Well?") for c in said] if late else said

    result = play(prompts, tmp_path / "late", Rambler([" Yes", " No", " Perhaps"]), Judge())
    row = read_rows(tmp_path / "late" / "demonstrations.jsonl")[0]
    assert row["ended"] == "no_candidate"
    assert [m["role"] for m in row["messages"]] == [
        "user",
        "assistant",
    ]  # no answer, nothing to learn
    assert result["metrics"]["rejected_candidates"] == {"another_turn": 9}
    # At the first turn nothing is left to learn from.
    result = play(prompts, tmp_path / "early", Actors([" Yes, and:", "\n", " -"]), Judge(lambda _: 0.0), max_turns=1,
                  min_reward=1.0)  # fmt: skip
    assert result["metrics"]["demonstrations"] == 0
    assert result["metrics"]["rejected"] == {"low_reward": 3}


def test_dialogues_below_the_floor_are_kept_apart(prompts: Path, tmp_path: Path) -> None:
    engine = Actors([" Go south"], lambda prompt: " Thank you!" if "river 1" in prompt else " Is it far?")
    judge = Judge(lambda answer: 1.0 if answer.endswith("2.") else -1.0)  # the second answer is the worse
    result = play(prompts, tmp_path / "out", engine, judge, min_reward=0.0, candidates=1)
    assert [row["id"] for row in read_rows(tmp_path / "out" / "demonstrations.jsonl")] == ["p1"]
    rejected = read_rows(tmp_path / "out" / "demonstrations.rejected.jsonl")
    assert [(row["id"], row["reason"]) for row in rejected] == [("p0", "low_reward"), ("p2", "low_reward")]
    assert result["metrics"]["ended"] == {"goodbye": 1, "max_turns": 2}
    assert result["metrics"]["answers"] == {"1": 1, "2": 2}


# --- the rules ---


@pytest.mark.parametrize(
    ("text", "finish", "rule"),
    [
        (" The river is south of here.", "stop", None),
        (" Yes.", "stop", None),
        ("  ...", "stop", "empty"),
        (" The river is south of", "length", "unfinished"),
        (" Here is a list:", "stop", "unfinished"),
        (" South.\n\nAssistant: North.", "stop", "another_turn"),
        (" South.\nHuman: And?", "stop", "another_turn"),
        (" A human: that is what I am not.", "stop", None),
        (" South of the hill is the river. " * 4, "stop", "repeats_itself"),
        (f" {QUESTION.upper()}", "stop", "repeats_turn"),
    ],
)
def test_candidate_rules(text: str, finish: str, rule: str | None) -> None:
    assert broken_rule(Completion(text, (), finish), [QUESTION]) == rule


def test_a_list_of_similar_lines_is_no_loop() -> None:
    assert not repeats_itself("The cat is small. The dog is large. The hen is small. The cow is large.")
    assert repeats_itself("I see. I see. I see. I see. I see.")


@pytest.mark.parametrize(
    ("text", "finish", "end"),
    [
        (" Why is that?", "stop", None),
        ("\n", "stop", "empty"),
        (" where is  the RIVER", "stop", "repeats"),
        (" Thanks, that\u2019s all.", "stop", "goodbye"),
        (" Thanks! And the hill?", "stop", None),
        (" Write a letter to thank my teacher.", "stop", None),
        (" I would like to say thank you to all of the people who live there.", "stop", None),
        (" Say what the bypass is for.", "stop", None),  # no "bye" in it
        (" and then and then", "length", "too_long"),
        (" Hm.\nAssistant: Yes.", "stop", "another_turn"),
    ],
)
def test_user_turns_that_end_a_dialogue(text: str, finish: str, end: str | None) -> None:
    assert end_at_user(Completion(text, (), finish), [QUESTION], GOODBYES) == end


def test_goodbyes_are_configurable() -> None:
    assert says_goodbye("Over and out.", ["over and out"])
    assert not says_goodbye("Over and out.", GOODBYES)
    assert not says_goodbye("Over and out.", ["", "!"])


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "judge", "message"),
    [
        ({"assistant_demonstrations": "HH"}, Judge(), "no demonstrations 'HH'; did you mean 'HHH'"),
        ({"shots": 3}, Judge(), "hold 2 conversations, fewer than 3 shots"),
        ({}, None, "needs a reward model"),
        ({"unguided": True, "min_reward": 0.0}, None, "needs a reward model"),
    ],
)
def test_bad_settings_cost_no_model(
    prompts: Path, tmp_path: Path, changes: dict[str, Any], judge: Judge | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        play(prompts, tmp_path / "out", None, judge, **changes)
    assert not (tmp_path / "out").exists()


def test_bad_and_repeated_prompts(tmp_path: Path) -> None:
    def file(*rows: tuple[str, str]) -> Path:
        path = tmp_path / "some.jsonl"
        path.write_text("".join(json.dumps({"id": id, "prompt": text}) + "\n" for id, text in rows))
        return path

    for rows, message in (([], "no prompt"), ([("a", " ")], "empty"), ([("a", "x"), ("a", "y")], "there twice")):
        with pytest.raises(DataError, match=message):
            play(file(*rows), tmp_path / "bad", None, Judge())
    result = play(file(("a", "x?"), ("b", "x?")), tmp_path / "out", Actors([" Yes"]), Judge(), candidates=1)
    assert (result["metrics"]["dialogues"], result["metrics"]["duplicate_prompts"]) == (1, 1)


def test_a_full_context_ends_a_dialogue_and_is_refused_at_the_start(prompts: Path, tmp_path: Path) -> None:
    def engine(context_length: int) -> Actors:
        actors = Actors([" Yes"])
        actors._context_length = context_length
        return actors

    # Words: header and rule 6, shot and rule 5, the prompt with both markers 7: with 12 new ones 30. At the second turn
    # an answer of 2 words and a question of 2 come on top, with a marker: 35.
    settings = {"candidates": 1, "max_new_tokens": 12, "user_max_new_tokens": 4, "max_turns": 9}
    with pytest.raises(InputError, match="no dialogue fits the context of the assistant's model"):
        play(prompts, tmp_path / "none", engine(29), Judge(), **settings)
    result = play(prompts, tmp_path / "some", engine(34), Judge(), **settings)
    assert result["metrics"]["ended"] == {"context_full": 3}
    assert result["metrics"]["demonstrations"] == 3


# --- killed and run again ---


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in OUTPUTS}


def asks(prompt: str) -> str:
    return " Thanks!" if "river 2" in prompt else f" And {prompt.count('Human')}?"


@pytest.mark.parametrize("die_after", range(1, 9))
def test_a_run_that_died_ends_in_the_same_bytes(prompts: Path, tmp_path: Path, die_after: int) -> None:
    answers = [" No", " The long way round", " South"]
    whole = play(prompts, tmp_path / "whole", Actors(answers, asks), Judge())
    with pytest.raises(KeyboardInterrupt):
        play(prompts, tmp_path / "out", Actors(answers, asks, die_after), Judge())
    log = tmp_path / "out" / "turns.jsonl"
    if die_after % 2:
        log.write_bytes(log.read_bytes()[:-7])  # the last line was being written
    again = Actors(answers, asks)
    result = play(prompts, tmp_path / "out", again, Judge())
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert result["metrics"] == whole["metrics"]
    # 3 answers, 3 user turns, 2 answers; one that was cut short is asked for again.
    assert sum(len(texts) for texts, _ in again.calls) == 8 - die_after + die_after % 2
    assert play(prompts, tmp_path / "out", None, Judge()) == result  # done: no engine is asked for
    with pytest.raises(StoreError, match="candidates was 3, is 2"):
        play(prompts, tmp_path / "out", None, Judge(), candidates=2)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_self_play as t
def judge(answer):
    judge.left -= 1
    if judge.left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(answer))
judge.left = int(sys.argv[4])
t.play(Path(sys.argv[2]), Path(sys.argv[3]), t.Actors([" No", " The long way round"], t.asks), t.Judge(judge))
"""


@pytest.mark.parametrize("after", [2, 9])
def test_sigkill(prompts: Path, tmp_path: Path, after: int) -> None:
    def run(left: int, folder: Path) -> int:
        arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(prompts), str(folder), str(left)]
        return subprocess.run(arguments, check=False, capture_output=True).returncode

    assert run(after, tmp_path / "out") == -signal.SIGKILL
    assert run(0, tmp_path / "out") == 0
    assert run(0, tmp_path / "whole") == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


# --- real models ---


def test_with_real_models(prompts: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    import torch

    from almost_eval.engines.hf import HFEngine
    from almost_eval.nano.seeded import build_checkpoint
    from almost_eval.rewards.hf import HFRewardModel

    torch.set_num_threads(1)
    text = ["the river is south of the hill, and the hill is north of the river."] * 4
    reward = build_checkpoint(
        tmp_path / "reward", reward=True, hidden_size=32, layers=1, vocab_size=300, max_position_embeddings=512,
        tokenizer_text=text,
    )  # fmt: skip
    models = {"policy": tiny_checkpoint("llama-gqa"), "user": tiny_checkpoint("qwen2")}
    loaded: list[str] = []

    def engine_for(name: str) -> HFEngine:
        loaded.append(name)
        return HFEngine(str(models[name]))

    settings = replace(
        SETTINGS, assistant_model="policy", user_model="user", assistant_demonstrations="plain",
        user_demonstrations="plain", max_new_tokens=24, user_max_new_tokens=24, seed=3,
    )  # fmt: skip

    def run(output: Path) -> dict[str, Any]:
        return self_play(settings, prompts, str(reward), output, engine_for=engine_for, demonstrations=DEMONSTRATIONS)

    result = run(tmp_path / "one")
    assert loaded == ["policy", "user"]
    assert result["metrics"]["candidates"] >= 9
    # Random weights stop nowhere, so most candidates are unfinished: they have their reward all the same.
    judge = HFRewardModel(str(reward))
    for row in read_rows(tmp_path / "one" / "candidates.jsonl")[:3]:
        prompt = Message("user", f"Where is the river {row['id'][1]}?")
        for candidate in row["candidates"]:
            if candidate["reward"] is not None:
                [alone] = judge.score([(prompt, Message("assistant", candidate["text"]))])
                assert candidate["reward"] == pytest.approx(alone, abs=1e-4)
    run(tmp_path / "two")
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")
