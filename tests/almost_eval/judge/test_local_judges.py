"""Judges without a key: the oracle by its own facts, a reward model by its raw logits."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from almost_eval.data.sources import find_data
from almost_eval.errors import InputError
from almost_eval.files import write_rows
from almost_eval.judge.answers import ArchivedSystem, ModelSystem, Sampling, System
from almost_eval.judge.judges import Judge, Judgement
from almost_eval.judge.local import TIE_MARGIN, NanoJudge, RewardJudge, judge_by_oracle, judge_by_reward
from almost_eval.judge.panel import Panel, members_of
from almost_eval.judge.questions import find_questions
from almost_eval.judge.records import Answer, Order, Pair, Question, Verdict
from almost_eval.judge.run import JudgeRun
from almost_eval.nano import shipped
from almost_eval.nano.oracle import score_text
from almost_eval.nano.world import World
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.run.store import read_spec
from almost_eval.types import Message


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return find_questions(None, find_data("nano", None))[0]


@pytest.fixture(scope="module")
def reward_judge() -> RewardJudge:
    return RewardJudge(HFRewardModel("nano/reward"), "reward:nano/reward")


def pair(question: Question, first: str, second: str, order: Order = "forward") -> Pair:
    return Pair(question, Answer(question.id, first, "one"), Answer(question.id, second, "two"), order)


def pairs_of(questions: list[Question]) -> list[Pair]:
    """A good and a bad answer to each question, in turn first and second."""
    world = World()
    found = []
    for number, question in enumerate(questions):
        query = world.parse(question.text)
        assert query is not None
        answers = [world.respond(world.generator(question.id), query, quality) for quality in (3, 0)]
        good, bad = answers
        found.append(pair(question, good, bad) if number % 2 else pair(question, bad, good))
    return found


def judged(judge: NanoJudge | RewardJudge, pairs: list[Pair]) -> list[Judgement]:
    found = dict(judge.stream(pairs, range(len(pairs))))
    return [found[i] for i in range(len(pairs))]


def test_the_oracle_prefers_what_is_true(questions: list[Question]) -> None:
    pairs = pairs_of(questions)
    NanoJudge().check(questions)
    for number, (one, judgement) in enumerate(zip(pairs, judged(NanoJudge(), pairs), strict=True)):
        assert judgement.verdict is not None
        first, second = (score_text(one.question.text, answer.text) for answer in (one.answer_1, one.answer_2))
        assert first is not None
        assert second is not None
        assert judgement.verdict.score_1 == pytest.approx(1 + 9 * first.overall, abs=0.005)
        assert judgement.verdict.score_2 == pytest.approx(1 + 9 * second.overall, abs=0.005)
        if abs(first.overall - second.overall) >= TIE_MARGIN:
            assert judgement.verdict.winner == ("1" if first.overall > second.overall else "2")
        assert judgement.verdict.winner != ("2" if number % 2 else "1")  # the good answer never loses


def test_the_oracle_has_no_place_it_prefers(questions: list[Question]) -> None:
    for one in pairs_of(questions):
        there = judge_by_oracle(one).verdict
        back = judge_by_oracle(Pair(one.question, one.answer_2, one.answer_1, "reverse")).verdict
        assert there is not None
        assert back is not None
        assert (there.winner, back.winner) in {("1", "2"), ("2", "1"), ("tie", "tie")}
        assert (there.score_1, there.score_2) == (back.score_2, back.score_1)


def test_equal_and_empty_answers_are_judged(questions: list[Question]) -> None:
    one = judge_by_oracle(pair(questions[0], "", ""))
    assert one.verdict == Verdict("tie", 1.0, 1.0)
    assert one.outputs["review"].startswith("1 1\n")


def test_the_oracle_knows_no_other_questions(questions: list[Question]) -> None:
    with pytest.raises(InputError, match="question q is not of the nano world, and --judge nano knows no other"):
        NanoJudge().check([*questions, Question("q", "How can I improve my time management skills?")])


def test_rewards_are_the_models_own(questions: list[Question], reward_judge: RewardJudge) -> None:
    pairs = pairs_of(questions)
    model = HFRewardModel("nano/reward")
    for one, judgement in zip(pairs, judged(reward_judge, pairs), strict=True):
        asked = Message("user", one.question.text)
        rewards = model.score([(asked, Message("assistant", a.text)) for a in (one.answer_1, one.answer_2)])
        assert judgement.outputs["rewards"] == pytest.approx(rewards, abs=1e-4)
        assert judgement.verdict == Verdict("1" if rewards[0] > rewards[1] else "2")
        assert judgement.outputs["scores"] is None


def test_what_is_wanted_changes_no_bit(questions: list[Question], reward_judge: RewardJudge) -> None:
    pairs = pairs_of(questions)
    whole = dict(reward_judge.stream(pairs, range(len(pairs))))
    wanted = [3, 50, 79]
    assert dict(reward_judge.stream(pairs, wanted)) == {index: whole[index] for index in wanted}


def test_both_orders_and_equal_answers(questions: list[Question], reward_judge: RewardJudge) -> None:
    good, bad = "The otter eats fish.", "dunno"
    pairs = [
        pair(questions[0], good, bad),
        pair(questions[0], bad, good, "reverse"),
        pair(questions[0], good, good),
        pair(questions[0], "", ""),
    ]
    there, back, same, empty = (judgement.verdict for judgement in judged(reward_judge, pairs))
    assert (there, back) in {(Verdict("1"), Verdict("2")), (Verdict("2"), Verdict("1"))}
    assert same == empty == Verdict("tie")


def test_what_does_not_fit_is_unscored_and_the_rest_is_judged(
    questions: list[Question], reward_judge: RewardJudge
) -> None:
    long, short = judged(
        reward_judge, [pair(questions[0], "word " * 5000, "a"), pair(questions[0], "The otter eats fish.", "a")]
    )
    assert (long.verdict, long.reason) == (None, "context_too_long")
    assert short.verdict is not None


@pytest.mark.parametrize("broken", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_reward_that_is_no_number_decides_nothing(broken: tuple[float, float]) -> None:
    judgement = judge_by_reward(*broken)
    assert (judgement.verdict, judgement.reason) == (None, "non_finite")
    assert None in judgement.outputs["rewards"]


DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"


def _judged_run(reward: Path, baseline: Path, now: str, *, in_panel: bool = False) -> JudgeRun:
    data = find_data("nano", None)
    questions, fingerprint = find_questions(None, data, limit=2)
    sampling = Sampling(temperature=0, max_new_tokens=4)
    systems: list[System] = [ArchivedSystem(baseline, questions), ModelSystem("nano/almost", questions, sampling)]
    model = HFRewardModel(str(reward))
    model.template = replace(model.template, now=now)
    judge: Judge = RewardJudge(model, "reward:dated")
    if in_panel:
        judge = Panel([NanoJudge(), judge])
    return JudgeRun(questions, fingerprint, "nano", systems, judge)


@pytest.mark.parametrize("in_panel", [False, True])
def test_a_judged_run_goes_on_tomorrow_with_the_date_of_its_judge(tmp_path: Path, in_panel: bool) -> None:
    """A reward model whose template writes the date gives the rewards of the day on which the run began."""
    reward = shutil.copytree(shipped("nano/reward"), tmp_path / "reward")
    (reward / "chat_template.jinja").write_text(DATED)
    baseline = tmp_path / "baseline.jsonl"
    questions, _ = find_questions(None, find_data("nano", None), limit=2)
    write_rows(baseline, [{"question_id": q.id, "text": "No.", "model_id": "b"} for q in questions])

    first, tomorrow = (_judged_run(reward, baseline, f"2026-11-{day}T10:00:00", in_panel=in_panel) for day in (28, 29))
    assert first.default_folder() == tomorrow.default_folder()
    first.execute(tmp_path / "run")
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "samples.jsonl").write_text(lines[0])
    tomorrow.execute(tmp_path / "run")
    assert sorted((tmp_path / "run" / "samples.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    *_, judge = members_of(read_spec(tmp_path / "run")["settings"]["judge"])
    assert judge["template"]["now"] == "2026-11-28T10:00:00"
    other = _judged_run(reward, baseline, "2026-11-29T10:00:00", in_panel=in_panel)
    other.execute(tmp_path / "other")
    assert (tmp_path / "other" / "samples.jsonl").read_text() != (tmp_path / "run" / "samples.jsonl").read_text()
