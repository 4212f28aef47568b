"""`--scale tiny`: every built-in recipe from prompts to the evaluation, on the code path of its full form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_environment import DATA_ROOT

from almost_eval.errors import InputError
from almost_eval.files import read_json
from almost_train.common.config import settings_to_dict
from almost_train.pipeline.recipe import load_recipe
from almost_train.pipeline.run import Pipeline
from almost_train.pipeline.scale import MODELS_VARIABLE, scaled
from almost_train.rlsf.job import RLSFSettings
from almost_train.sft.run import SFTSettings

RECIPES = ("llama-7b", "7b-lora", "smollm")


@pytest.mark.parametrize("name", RECIPES)
def test_what_stays_and_what_becomes_small(name: str) -> None:
    full, tiny = load_recipe(name), scaled(load_recipe(name), "tiny", "nano/vanilla-medium")
    assert tiny.sections.keys() == full.sections.keys()
    own, small = (settings_to_dict(r.settings("rlsf", RLSFSettings)) for r in (full, tiny))
    assert {key for key in ("algorithm", "bf16", "gradient_checkpointing") if own[key] != small[key]} == set()
    assert bool(own["lora_rank"]) == bool(small["lora_rank"])
    assert small["batch_size"] < own["batch_size"]
    assert tiny.settings("sft", SFTSettings, "model").bf16 == full.settings("sft", SFTSettings, "model").bf16
    models = {tiny.sections[section].get("model") for section in ("prompts", "reward", "sft")}
    assert models == {"nano/vanilla-medium"}
    assert tiny.value("comparisons", "ranking") == full.value("comparisons", "ranking")
    assert tiny.engine["engine"] == "hf"


def test_a_small_model_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(MODELS_VARIABLE, raising=False)
    with pytest.raises(InputError, match=r"--scale tiny needs a small model \(ALMOST_REAL_MODELS is not set\)"):
        scaled(load_recipe("smollm"), "tiny", None)
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match="smollm2-135m-instruct is not there"):
        scaled(load_recipe("smollm"), "tiny", None)
    with pytest.raises(InputError, match="at --scale tiny; add that"):
        scaled(load_recipe("smollm"), "full", "nano/vanilla-medium")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(name: str, real_models: Any, tmp_path: Path) -> None:
    recipe = scaled(load_recipe(name), "tiny", str(real_models.smollm2))
    if recipe.prompt_set == "official" and not DATA_ROOT.is_dir():
        pytest.skip(f"no data root at {DATA_ROOT}; set ALMOST_DATA_ROOT")
    reports = Pipeline(recipe, tmp_path / name, str(DATA_ROOT)).run()
    assert [report.name for report in reports] == list(recipe.sections)
    assert {report.state for report in reports} == {"made"}
    result = read_json(tmp_path / name / "rlsf" / "result.json")
    assert result["metrics"]["steps"] == 2
    assert (tmp_path / name / "rlsf" / "policy" / "adapter_config.json").exists() == (name == "7b-lora")
    assert reports[-1].result["metrics"]["rlsf"]
