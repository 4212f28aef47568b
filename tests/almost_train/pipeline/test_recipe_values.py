"""`--set` and `--place`: a recipe with other settings, and with models and files of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from almost_eval.errors import InputError
from almost_train.cli.main import cli
from almost_train.pipeline.recipe import load_recipe


def test_settings_and_sections() -> None:
    recipe = load_recipe(
        "nano",
        values=["comparisons.length_rule=true", "rlsf=null", "held_out=null", "reward.stop=[a, b]", "dpo.beta=0.5"],
    )
    assert recipe.sections["comparisons"]["length_rule"] is True
    assert "rlsf" not in recipe.sections
    assert recipe.held_out is None
    assert recipe.sections["reward"]["stop"] == ["a", "b"]
    assert recipe.sections["dpo"] == {"beta": 0.5}
    assert load_recipe("nano").sections["comparisons"]["length_rule"] is False


def test_a_place_is_taken_wherever_the_name_stands() -> None:
    own = "google/gemma-3-270m"
    recipe = load_recipe("gemma-270m", places={own: "./gemma", "held-out.jsonl": "/data/held-out.jsonl"})
    models = [c["model"] for c in recipe.sections["responses"]["configurations"]]
    assert models == ["./gemma"] * 3 + ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert {recipe.sections[name]["model"] for name in ("prompts", "reward", "sft")} == {"./gemma"}
    assert recipe.sections["self_play"]["user_model"] == "./gemma"
    assert own not in repr(recipe.sections)
    assert recipe.held_out == recipe.sections["evaluation"]["prompts"] == "/data/held-out.jsonl"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "length_rule"], "'length_rule' sets nothing; write SECTION.SETTING=VALUE"),
        (["--set", "comparison.length_rule=true"], "unknown section 'comparison'; did you mean 'comparisons'"),
        (["--set", "comparisons.length_rul=true"], "comparisons: unknown setting 'length_rul'; did you mean"),
        (["--set", "seed.value=1"], "'seed' has no settings of its own; write seed=VALUE"),
        (["--set", "reward.model=[a"], "the value is not YAML"),
        (["--place", "nano/vanilla-larg=./x"], "names no 'nano/vanilla-larg'; did you mean 'nano/vanilla-large'"),
        (["--place", "./x"], "'./x' is not NAME=PATH"),
    ],
)
def test_what_fits_nothing_is_refused_in_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["run", "nano", *flags, "--dry-run", "--output", str(tmp_path / "out")])
    # click prints its own errors; ours reach the command line's frame, which prints them and exits with 2.
    assert isinstance(result.exception, InputError) or result.exit_code == 2
    assert message in " ".join(f"{result.exception} {result.output}".split())
    assert not (tmp_path / "out").exists()
