"""How names, paths and numbers of a recipe may be written, and what stands behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from almost_eval.errors import InputError
from almost_eval.files import read_rows, write_rows
from almost_eval.progress import Progress
from almost_train.cli.main import cli
from almost_train.common.held_out import read_held_out
from almost_train.common.stage import model_input
from almost_train.pipeline.plan import held_out_file, plan
from almost_train.pipeline.recipe import RECIPES, load_recipe
from almost_train.pipeline.run import Pipeline
from almost_train.pipeline.scale import scaled
from almost_train.synthetic.ranking import ranking_text, read_ranking


def written(folder: Path, **changed: Any) -> str:
    """A file with the recipe `nano`, and some sections in another form."""
    content = yaml.safe_load((RECIPES / "nano.yaml").read_text(encoding="utf-8")) | changed
    (folder / "own.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "own.yaml")


# --- hyphens ---


def test_a_hyphen_may_stand_for_each_underscore(tmp_path: Path) -> None:
    nano = load_recipe("nano")
    content = {"self_play": None, "self-play": dict(nano.sections["self_play"])}
    content["evaluation"] = {key.replace("_", "-"): value for key, value in nano.sections["evaluation"].items()}
    file = written(tmp_path, **content)
    text = Path(file).read_text(encoding="utf-8").replace("self_play: null\n", "")
    Path(file).write_text(text, encoding="utf-8")
    recipe = load_recipe(file, values=["rlsf.learning-rate=0.5", "self-play.shots=2", " rlsf.steps = 7"])
    assert recipe.sections["evaluation"] == nano.sections["evaluation"]
    assert recipe.sections["self_play"] == {**nano.sections["self_play"], "shots": 2}
    assert recipe.sections["rlsf"] == {**nano.sections["rlsf"], "learning_rate": 0.5, "steps": 7}
    tiny = scaled(load_recipe(file), "tiny", "nano/vanilla-small")
    assert tiny.sections["evaluation"]["max_new_tokens"] == 8
    plan(tiny, tmp_path / "out", None, Progress())


def test_both_spellings_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, **{"self-play": {}})
    with pytest.raises(InputError, match="recipe own: self_play stands there twice, with - and with _; keep one"):
        load_recipe(file)
    file = written(tmp_path, sft={"batch_size": 1, "batch-size": 2})
    with pytest.raises(InputError, match="recipe own, sft: batch_size stands there twice"):
        load_recipe(file)


# --- paths ---


def test_the_home_folder_may_be_written_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    recipe = load_recipe("nano", values=["sft.model=~/model", "held_out=~/prompts.jsonl"])
    assert recipe.sections["sft"]["model"] == f"{tmp_path}/model"
    assert recipe.held_out == f"{tmp_path}/prompts.jsonl"
    assert model_input("~/model") == tmp_path / "model"  # by its content: as a name it was the same after a change
    assert model_input("org/name") == "org/name"


def test_a_variable_is_refused(tmp_path: Path) -> None:
    for model in ("$HOME/model", "${MODELS}/a"):  # the first looks like a model of the hub
        with pytest.raises(
            InputError, match=r"recipe nano, sft: model is .*variables are not replaced here; .*--place"
        ):
            load_recipe("nano", values=[f"sft.model={model}"])
    assert load_recipe("nano", values=["evaluation.stop=[$]"]).sections["evaluation"]["stop"] == ["$"]


def test_output_is_no_folder_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_rows(
        tmp_path / "home" / "pairs.jsonl", [{"prompt": "a?", "chosen": f"{i}", "rejected": "x"} for i in range(4)]
    )
    Path("config.yaml").write_text("output: ~/run\ncomparisons: ~/pairs.jsonl\n", encoding="utf-8")
    flags = ["reward", "--config", "config.yaml", "--model", "nano/vanilla-small", "--batch-size", "2"]
    assert CliRunner().invoke(cli, [*flags, "--device", "cpu"]).exit_code == 0
    assert (tmp_path / "home" / "run" / "model").is_dir()
    assert not Path("~").exists()


# --- numbers and names ---


@pytest.mark.parametrize("value", ["x", None, 8.5, [1]])
def test_tiny_scale_refuses_what_is_no_number_as_full_scale_does(value: object, tmp_path: Path) -> None:
    nano = load_recipe("nano")
    configurations = [{**c, "shots": value} for c in nano.sections["responses"]["configurations"]]
    for changed, message in (
        ({"reward": {**nano.sections["reward"], "lora_rank": value}}, "reward: lora_rank is"),
        ({"responses": {"configurations": configurations}}, "responses, configuration 1: shots is"),
    ):
        recipe = scaled(load_recipe(written(tmp_path, **changed)), "tiny", "nano/vanilla-small")
        with pytest.raises(InputError, match=f"recipe own, {message} .*; it must be a whole number"):
            plan(recipe, tmp_path / "out", None, Progress())


def test_configurations_may_be_called_as_yaml_calls_other_things(tmp_path: Path) -> None:
    ranking = (("1", "no"), ("1e3", "2026-01-01"), ("010", "7b-good"), ("null",))
    (tmp_path / "ranking.yaml").write_text(ranking_text(ranking), encoding="utf-8")
    assert read_ranking(tmp_path / "ranking.yaml") == ranking
    assert ranking_text((("a-5", "b.1"), ("c",))) == "- [a-5, b.1]\n- [c]\n"  # a stage's input, by its bytes


def test_an_error_names_the_ranking() -> None:
    recipe = load_recipe("nano", values=["comparisons.ranking=large-good-5"])
    with pytest.raises(InputError, match="recipe nano, comparisons: ranking must be a list of configurations"):
        plan(recipe, Path("nowhere"), None, Progress())


def test_a_list_is_asked_for_where_one_is_missing() -> None:
    recipe = load_recipe("nano", values=["evaluation.stop=null"])
    with pytest.raises(InputError, match="evaluation: stop is empty; it must be a list"):
        plan(recipe, Path("nowhere"), None, Progress())


# --- held-out prompts ---


def test_what_the_evaluation_asks_is_kept_out_of_training(tmp_path: Path) -> None:
    asked = [{"id": str(i), "prompt": text} for i, text in enumerate(["How big is the otter?", "Who are you?"])]
    write_rows(tmp_path / "asked.jsonl", asked)
    evaluation = {"prompts": str(tmp_path / "asked.jsonl")}
    recipe = load_recipe(written(tmp_path, held_out=None, evaluation=evaluation))
    folder = tmp_path / "out"
    Pipeline(recipe, folder).run("prompts")
    mined = {row["prompt"] for row in read_rows(folder / "prompts" / "prompts.jsonl")}
    assert mined.isdisjoint(row["prompt"] for row in asked)
    from almost_eval.files import read_json

    assert "held_out" in read_json(folder / "prompts" / "stage.json")["inputs"]


def test_held_out_prompts_of_several_sources(tmp_path: Path) -> None:
    one, more, other = (tmp_path / f"{name}.jsonl" for name in ("one", "more", "other"))
    for file, texts in ((one, ["A b?"]), (more, ["c", "A b?"]), (other, ["d e", "?"])):
        write_rows(file, [{"prompt": text} for text in texts])
    file = tmp_path / "held-out.jsonl"
    assert held_out_file([str(one), str(more)], file) == more  # the other one is in it
    assert not file.exists()
    assert held_out_file([str(one), str(other)], file) == file
    assert read_held_out(file) == read_held_out(one) | {("d", "e")}
    assert held_out_file(["nano", str(one)], file) == file
    with_nano = read_held_out(file)
    assert held_out_file(["nano"], file) == file
    assert with_nano == read_held_out(file) | read_held_out(one)
