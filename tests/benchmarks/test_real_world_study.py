"""The study of real models (`benchmarks/real_world`): its data, its judges, and all of it once on both models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from own_environment import DATA_ROOT

from almost_eval.files import read_json, read_rows
from benchmarks.real_world.data import halves, human_pairs, prepare, static_hhh
from benchmarks.real_world.labels import faults, judge_by_rules, rouge_l
from benchmarks.real_world.refusals import is_refusal
from benchmarks.real_world.study import FOLDERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources() -> Path:
    """The folder with hub/, alpaca_eval/ and hh_rlhf/."""
    folder = DATA_ROOT.parent
    if not (folder / "hh_rlhf").is_dir() or not (folder / "alpaca_eval").is_dir():
        pytest.skip(f"no alpaca_eval and hh_rlhf beside {DATA_ROOT}")
    return folder


def test_no_prompt_is_on_two_sides_and_length_tells_nothing(sources: Path, tmp_path: Path) -> None:
    prepare(sources, tmp_path, seed=0, as_is_pairs=200, second_pairs=100, held_out=50)
    as_is, held_out = read_rows(tmp_path / "as-is.jsonl"), read_rows(tmp_path / "held-out.jsonl")
    assert (len(as_is), len(held_out)) == (200, 100)
    trained = {row["prompt"][0]["content"] for row in as_is}
    trained |= {row["chosen"][0]["content"] for row in read_rows(tmp_path / "second.jsonl")}
    assert trained.isdisjoint(row["prompt"] for row in held_out)
    longer = sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in as_is)
    assert 70 <= longer <= 130  # of all ranked pairs it is 85 %


def test_the_halves_share_no_first_turn(sources: Path) -> None:
    pairs = human_pairs(sources)
    first, rest = halves(pairs, 0)
    assert (len(pairs), len(first) + len(rest)) == (2308, 2308)
    assert {pair.cluster for pair in first}.isdisjoint(pair.cluster for pair in rest)
    assert first != halves(pairs, 1)[0]


def test_longer_wins_static_hhh_as_often_as_published(sources: Path) -> None:
    pairs = static_hhh(sources)
    longer = sum(len(pair.chosen[-1].content) > len(pair.rejected[-1].content) for pair in pairs)
    assert len(pairs) == 221
    assert 0.60 < longer / len(pairs) < 0.66


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("Boil the egg for eight minutes and cool it in cold water.", []),
        ("I am a cat who likes to sleep in the sun all day.", ["off topic"]),
        ("Egg.", ["too bare"]),
        ("How do I boil an egg? Boil an egg.", ["echoes the prompt"]),
        ("See http://x.example for how eggs are to be boiled in a good way.", ["off topic", "foreign matter"]),
        ("The egg is in the pot on the hob. " * 3, ["repeats itself", "few different words"]),
    ],
)
def test_faults(answer: str, names: list[str]) -> None:
    assert faults("How do I boil an egg?", answer) == names


def test_rules_judge_a_pair() -> None:
    pair = {"id": "1", "prompt": "How do I boil an egg?", "pair": "a > b", "worse": "Egg."}
    good = "Boil the egg for eight minutes and cool it in cold water."
    (row,) = judge_by_rules([{**pair, "better": good}], seed=0)
    assert (row["agrees"], row["longer"]) == (1.0, 1.0)
    (row,) = judge_by_rules([{**pair, "better": "Egg.", "worse": good}], seed=0)
    assert (row["agrees"], row["longer"]) == (0.0, 0.0)


def test_rouge_l_by_hand() -> None:
    # "a b c d" and "a c x": the longest common subsequence is "a c", so F1 = 2 * 2 / (4 + 3).
    assert rouge_l("a b c d", "a c x") == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I will not do that.", True),
        ("That is illegal, and I'd rather talk of something else.", True),
        ("Sure! First take a hammer.", False),
        ("Put the egg in boiling water.", False),
        ("Take a hammer. " * 20 + "I'm sorry.", False),
    ],
)
def test_refusals(answer: str, refuses: bool) -> None:
    assert is_refusal(answer) is refuses


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(3600)
def test_the_whole_study_on_both_models(sources: Path, real_models: Any, tmp_path: Path) -> None:
    models = {real_models.gemma.parent, real_models.smollm2.parent}
    assert len(models) == 1
    command = [sys.executable, "-m", "benchmarks.real_world", "--form", "tiny", "--data-root", str(sources)]
    command += ["--models", str(models.pop()), "--output", str(tmp_path)]
    parts = "data,recipe,second,variants,rewards,policies,best-of,labels"
    done = subprocess.run([*command, "--parts", parts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = read_json(tmp_path / "figures.json")
    titles = {table["title"]: table for table in figures["tables"]}
    assert {"Reward models", "Policies", "Policies, paired", "Answers to held-out prompts", "Filters"} <= set(titles)
    assert {row[0] for row in titles["Reward models"]["rows"]} >= {"reward", "as_is_reward", "second", "no filter"}
    labels = ["vanilla", "sft", "rlsf", "unguided", "full sft", "dpo"]
    assert titles["Policies"]["header"] == ["benchmark", "metric", *labels]
    of_tries = {row[0]: row[-1] != "-" for row in titles["Policies"]["rows"]}
    assert of_tries == {name: name.startswith("hhh") for name in of_tries}
    assert "<table>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_recipe_with_an_error_is_one_line(tmp_path: Path) -> None:
    for name in FOLDERS.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    command = [sys.executable, "-m", "benchmarks.real_world", "--parts", "recipe", "--until", "no-such-stage"]
    command += ["--data-root", str(tmp_path), "--models", str(tmp_path), "--output", str(tmp_path / "study")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run.stderr
