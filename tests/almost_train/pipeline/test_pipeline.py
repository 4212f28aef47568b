"""A small recipe on the shipped vanilla models, whole: made, kept, made anew, killed and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from almost_eval.errors import InputError
from almost_eval.files import digest_path, read_rows
from almost_eval.nano.world import World
from almost_train.pipeline.plan import plan
from almost_train.pipeline.recipe import RECIPES, load_recipe
from almost_train.pipeline.run import Pipeline
from almost_train.pipeline.summary import draw, outcome

SMALL = "nano/vanilla-small"
TRAINING = {"learning_rate": 3e-4, "batch_size": 8, "micro_batch_size": 8, "max_length": 256}
RECIPE: dict[str, Any] = {
    "seed": 3,
    "prompt_set": "nano",
    "held_out": "nano",
    "prompts": {
        "model": SMALL,
        "count": 12,
        "overlap": 1.0,
        "min_characters": 1,
        "max_new_tokens": 16,
        "round_size": 16,
    },
    "responses": {
        "configurations": [
            {"name": "good", "model": SMALL, "demonstrations": "good", "shots": 3},
            {"name": "weak", "model": SMALL, "demonstrations": "weak", "shots": 1},
        ],
        "max_new_tokens": 24,
        "min_characters": 1,
        "rules": [],
    },
    "votes": {"count": 40},
    "as_is_reward": {"model": SMALL, **TRAINING},
    "comparisons": {"ranking": ["good", "weak"], "length_rule": False},
    "reward": {"model": SMALL, **TRAINING, "eval_share": 0.0},
    "self_play": {
        "assistant_model": SMALL,
        "user_model": SMALL,
        "assistant_demonstrations": "good",
        "user_demonstrations": "good",
        "candidates": 2,
        "max_turns": 2,
        "max_new_tokens": 24,
        "user_max_new_tokens": 16,
    },
    "sft": {"model": SMALL, **TRAINING, "epochs": 1},
    "rlsf": {
        "steps": 2,
        "batch_size": 8,
        "mini_batch_size": 8,
        "micro_batch_size": 8,
        "ppo_epochs": 1,
        "max_new_tokens": 16,
        "save_every": 1,
    },
    "evaluation": {"vanilla": SMALL, "nano_prompts": 6, "max_new_tokens": 16},
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    reports = Pipeline(load_recipe(str(recipe_file)), folder).run()
    assert [report.state for report in reports] == ["made"] * len(reports)
    return folder


def outputs(folder: Path) -> dict[str, Any]:
    """What every stage made, by digest; times left out."""
    return {
        file.parent.name: json.loads(file.read_text())["outputs"]
        for file in sorted(folder.glob("*/result.json"))
        if file.parent.parent == folder
    }


def written_at(folder: Path) -> dict[str, int]:
    """When every file of every stage was last written, in nanoseconds."""
    stages = [folder / name for name in outputs(folder)]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for stage in stages for file in stage.rglob("*")}


def test_every_stage_leaves_its_files(finished: Path) -> None:
    assert set(outputs(finished)) == set(RECIPE) - {"seed", "prompt_set", "held_out"}
    for made in (
        "prompts/prompts.jsonl",
        "responses/good.jsonl",
        "comparisons/comparisons.jsonl",
        "comparisons/comparisons.rejected.jsonl",
        "reward/model/model.safetensors",
        "self_play/demonstrations.jsonl",
        "self_play/candidates.jsonl",
        "sft/model/chat_template.jinja",
        "rlsf/policy/model.safetensors",
        "rlsf/log.jsonl",
        "evaluation/rlsf/answers/samples.jsonl",
    ):
        assert (finished / made).stat().st_size > 0, made
    assert not list(finished.rglob("*.pt"))
    assert not list(finished.rglob("*.bin"))


def test_no_stage_trains_on_what_the_evaluation_asks(finished: Path) -> None:
    world = World()
    asked = [row["prompt"] for row in read_rows(finished / "prompts" / "prompts.jsonl")]
    for row in read_rows(finished / "self_play" / "demonstrations.jsonl"):
        asked += [message["content"] for message in row["messages"] if message["role"] == "user"]
    queries = [query for text in asked if (query := world.parse(text)) is not None]
    assert len(queries) > 8
    known = {"unknown", "fact", "harmful", "advice", "list", "comparison"}
    assert {world.pool(query) for query in queries if query.kind in known - {"unknown"}} == {"train"}
    evaluated = [row["prompt"] for row in read_rows(finished / "evaluation-prompts.jsonl")]
    assert not set(asked) & set(evaluated)


def test_the_evaluation_judges_every_policy(finished: Path) -> None:
    metrics = json.loads((finished / "evaluation" / "result.json").read_text())["metrics"]
    assert list(metrics) == ["vanilla", "sft", "rlsf"]
    for name, by_name in metrics.items():
        assert by_name["reward"]["n"] == by_name["oracle"]["n"] == 6
        assert 0 <= by_name["oracle"]["value"] <= 1
        assert ("kl" in by_name) == (name != "sft")
    assert abs(metrics["rlsf"]["kl"]["value"]) < abs(metrics["vanilla"]["kl"]["value"]) + 5


def test_what_is_done_and_unchanged_is_kept(recipe_file: Path, finished: Path) -> None:
    before, written = outputs(finished), written_at(finished)
    reports = Pipeline(load_recipe(str(recipe_file)), finished).run()
    assert [report.state for report in reports] == ["kept"] * len(reports)
    assert outputs(finished) == before
    assert written_at(finished) == written
    assert draw(finished, reports) == finished / "summary.png"
    assert (finished / "summary.png").stat().st_size > 10_000
    assert "pairs" in outcome("comparisons", reports[4].result["metrics"])
    assert all(outcome(report.name, report.result["metrics"]) for report in reports)


def test_a_change_makes_anew_what_depends_on_it_and_loses_nothing(
    recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    changed = {**RECIPE, "sft": {**RECIPE["sft"], "learning_rate": 1e-3}}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    reports = Pipeline(load_recipe(str(file)), folder).run("rlsf")
    states = {report.name: report.state for report in reports}
    assert {name for name, state in states.items() if state == "made anew"} == {"sft", "rlsf"}
    assert {name for name, state in states.items() if state == "kept"} == set(states) - {"sft", "rlsf"}
    assert "learning_rate was 0.0003, is 0.001" in next(r.note for r in reports if r.name == "sft")
    assert digest_path(folder / "old" / "sft-1" / "model") == digest_path(finished / "sft" / "model")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(recipe_file: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "almost_train.cli", "run", str(recipe_file), "--output", str(folder)]
    for seconds in (9, 14, 19, 24):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert outputs(folder) == outputs(finished)


# --- recipes that cannot work ---


def check(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False), encoding="utf-8")
    from almost_eval.progress import Progress

    plan(load_recipe(str(file)), tmp_path / "run", None, Progress())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {}}, "recipe broken: unknown section 'rewards'; did you mean 'reward'?"),
        ({"sft": "nano"}, "recipe broken, sft: is 'nano'; it must be a mapping of settings"),
        ({"sft": {**TRAINING}}, "recipe broken, sft: 'model' is missing"),
        ({"sft": {"model": SMALL, "epoch": 1}}, "recipe broken, sft: unknown setting 'epoch'; did you mean 'epochs'?"),
        ({"engine": {"engin": "hf"}}, "recipe broken, engine: unknown option 'engin'; did you mean 'engine'?"),
        ({"prompt_set": "nan"}, "unknown prompt set 'nan'; did you mean 'nano'?"),
        ({"evaluation": {}}, "recipe broken, evaluation: give either prompts (a file) or nano_prompts (how many)"),
        (
            {"rlsf": {"algorithm": "rloo", "gamma": 0.9}},
            "algorithm rloo takes no gamma (of ppo); leave it out, or choose another algorithm",
        ),
        ({"rlsf": {"algorithm": "pp"}}, "recipe broken, rlsf: algorithm is 'pp'; did you mean 'ppo'?"),
        ({"self_play": {"assistant_demonstrations": "god"}}, "has no demonstrations 'god'; did you mean 'good'?"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        check(tmp_path, changes)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_stage_whose_input_no_stage_makes(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "self_play"}), encoding="utf-8")
    with pytest.raises(InputError, match="recipe broken, sft: it needs the section 'self_play', which is missing"):
        Pipeline(load_recipe(str(file)), tmp_path / "run").states()


def test_unknown_recipes_and_stages(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe 'nan'; did you mean 'nano'"):
        load_recipe("nan")
    with pytest.raises(InputError, match="has no stage 'rewar'; did you mean 'reward'"):
        Pipeline(load_recipe(str(recipe_file)), tmp_path / "run").run("rewar")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match="is not YAML"):
        load_recipe(str(broken))


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_the_shipped_recipes_are_sound(
    name: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = load_recipe(name).sections
    in_4_bits = [section for section, own in sections.items() if "quantize" in own]  # refused where there is no GPU
    recipe = load_recipe(name, values=[f"{section}.quantize=none" for section in in_4_bits])
    monkeypatch.chdir(tmp_path)  # where the recipes look for held-out prompts and other preferences: the user's files
    (tmp_path / "held-out.jsonl").write_text('{"id": "1", "prompt": "How are you?"}\n')
    (tmp_path / "as-is.jsonl").write_text('{"prompt": "How are you?", "chosen": "Well.", "rejected": "No."}\n')
    assert recipe.description
    states = Pipeline(recipe, tmp_path / "out", None if recipe.prompt_set == "nano" else str(data_root)).states()
    assert set(states.values()) == {"to do"}
    assert {"prompts", "responses", "comparisons", "reward", "self_play", "sft", "rlsf"} <= set(states)
