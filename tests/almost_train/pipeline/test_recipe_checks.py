"""A recipe that would fail later is refused in one line before the first stage."""

from __future__ import annotations

import copy
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from almost_eval.errors import InputError
from almost_train.cli.main import cli
from almost_train.pipeline.recipe import RECIPES, load_recipe
from almost_train.pipeline.run import Pipeline

NANO: dict[str, Any] = yaml.safe_load((RECIPES / "nano.yaml").read_text())


def refused(folder: Path, **changes: Any) -> str:
    """What a nano recipe with these sections (dotted: settings of a section) is refused with; nothing was made."""
    content = copy.deepcopy(NANO)
    for key, value in changes.items():
        section, _, setting = key.partition("__")
        if setting:
            content[section][setting] = value
        else:
            content[section] = value
    (folder / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(InputError) as error:
        Pipeline(load_recipe(str(folder / "mine.yaml")), folder / "out").states()
    assert not (folder / "out").exists()
    return str(error.value)


CONFIGURATIONS = NANO["responses"]["configurations"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward__model": "/nowhere/model"}, "recipe mine, reward: no model at '/nowhere/model'"),
        ({"reward__model": "nano/vanilla-tiny"}, "recipe mine, reward: no built-in model 'nano/vanilla-tiny'"),
        ({"reward__model": "model"}, "recipe mine, reward: no model at 'model'"),
        (
            {"sft__eval_every": 5},
            "recipe mine, sft: --eval-every measures held-out rows, and there are none; set eval_",
        ),
        ({"dpo": {"batch_size": 9}}, "recipe mine, dpo: batch_size 9 is not a multiple of 8"),
        ({"dpo": {"bta": 1}}, "recipe mine, dpo: unknown setting 'bta'; did you mean 'beta'"),
        ({"online_dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "recipe mine, online_dpo: --label-smoothing belongs"),
        ({"sft__model": "nano/reward"}, "recipe mine, sft: .* holds a LlamaForSequenceClassification"),
        ({"prompts__model": "nano/reward"}, "recipe mine, prompts: .* holds a LlamaForSequenceClassification"),
        ({"evaluation__vanilla": "/nowhere/third"}, "recipe mine, evaluation: no model at"),
        ({"self_play__user_model": "/nowhere"}, "recipe mine, self_play: no model at"),
        (
            {"evaluation": {"prompts": "no-such-file.jsonl", "vanilla": "nano/vanilla-medium"}},
            "recipe mine, evaluation: no-such-file.jsonl is not there",
        ),
        ({"held_out": "not-there.jsonl"}, "recipe mine, held_out: not-there.jsonl is not there"),
        (
            {"comparisons__ranking": [CONFIGURATIONS[0]["name"], "no-such"]},
            "recipe mine, comparisons: the ranking names 'no-such'; known: ",
        ),
        (
            {"responses__configurations": [{**CONFIGURATIONS[0], "shots": 500}, *CONFIGURATIONS[1:]]},
            "recipe mine, responses: configuration .* wants 500 shots; 'good' has 60",
        ),
        (
            {"responses__configurations": [{**CONFIGURATIONS[0], "shots": 60, "max_new_tokens": 700}]},
            "60 shots of 'good' are [0-9]+ tokens, and an answer may have [0-9]+; .* reads 2048",
        ),
        ({"self_play__shots": 61}, "recipe mine, self_play: the assistant wants 61 shots"),
        ({"sft__micro_batch_size": 5, "sft__batch_size": 32}, "recipe mine, sft: batch_size 32 is not a multiple of 5"),
        ({"rlsf__micro_batch_size": 7}, "recipe mine, rlsf: an update of [0-9]+ completions does not divide"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = refused(tmp_path, **changes)
    assert re.search(message, text), text
    assert "\n" not in text


def test_too_little_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 16))
    assert "GiB of weights at one time" in refused(tmp_path, seed=0)


def test_the_run_itself_is_refused_before_its_first_stage(tmp_path: Path) -> None:
    content = NANO | {"reward": NANO["reward"] | {"model": "/nowhere"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(cli, ["run", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError)
    assert not (tmp_path / "out" / "prompts").exists()


def test_the_shipped_recipe_of_the_built_in_world_passes(tmp_path: Path) -> None:
    assert set(Pipeline(load_recipe("nano"), tmp_path / "out").states().values()) == {"to do"}


def test_a_recipe_may_name_both_kinds_of_dpo(tmp_path: Path) -> None:
    content = copy.deepcopy(NANO) | {
        "dpo": {"beta": 0.2, "batch_size": 32, "eval_every": 5},
        "online_dpo": {"max_steps": 4, "max_new_tokens": 44},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    states = Pipeline(load_recipe(str(tmp_path / "mine.yaml")), tmp_path / "out").states()
    assert list(states)[-5:] == ["sft", "rlsf", "dpo", "online_dpo", "evaluation"]
