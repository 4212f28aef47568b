"""A recipe that would fail later is refused in one line before the first stage."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from almost_eval.errors import InputError
from almost_eval.types import Message
from almost_train.cli.main import cli
from almost_train.pipeline.preflight import shots_text
from almost_train.pipeline.recipe import RECIPES, load_recipe
from almost_train.pipeline.run import Pipeline
from almost_train.synthetic.prompt_sets import DemonstrationSet

NANO: dict[str, Any] = yaml.safe_load((RECIPES / "nano.yaml").read_text())


def refused(folder: Path, changes: Mapping[Any, Any]) -> str:
    """What a nano recipe with these sections (dotted: settings of a section) is refused with; nothing was made."""
    content = copy.deepcopy(NANO)
    for key, value in changes.items():
        section, _, setting = key.partition("__") if isinstance(key, str) else (key, "", "")
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
        ({"engine": {"batch-size": 4, "batch_size": 8}}, "recipe mine, engine: batch_size stands there twice"),
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
        ({"rlsf__batch_size": 10}, "recipe mine, rlsf: batch_size 10 is not a multiple of mini_batch_size"),
        ({"reward__quantize": "4bit", "reward__lora_rank": 4}, "recipe mine, reward: --quantize 4bit needs an NVIDIA"),
        ({"sft__merge": True}, "recipe mine, sft: --merge without a rank"),
        (
            {"sft__lora_rank": 4, "sft__lora_targets": ["q_prj"]},
            "recipe mine, sft: lora_targets: no layer is called 'q_prj'; did you mean 'q_proj'",
        ),
        ({"reward__margin": True}, "recipe mine, reward: margin: the pairs of the stage 'comparisons' have none"),
        ({"reward__model": 3}, "recipe mine, reward: model is 3; it must be a text"),
        ({"rlsf__device": "gpu"}, "recipe mine, rlsf: device 'gpu' is not usable here"),
        ({"evaluation__device": "gpu"}, "recipe mine, evaluation: device 'gpu' is not usable here"),
        ({"rlsf__max_new_tokens": 2048}, "recipe mine, rlsf: max_new_tokens 2048 leaves no room for a prompt: nano/v"),
        ({"online_dpo": {"max_new_tokens": 1024}}, "online_dpo: max_new_tokens 1024 leaves a prompt no room in max_l"),
        ({"evaluation__max_new_tokens": 5000}, "recipe mine, evaluation: max_new_tokens 5000 leaves no room"),
        ({"evaluation__stop": [""]}, "recipe mine, evaluation: an empty stop string"),
        ({"evaluation__nano_prompts": "many"}, "recipe mine, evaluation: nano_prompts is 'many'; it must be a whole"),
        ({"evaluation__nano_prompts": 0}, "recipe mine, evaluation: nano_prompts is 0; it must be at least 1"),
        ({"evaluation__nano_prompts": 10**6}, "recipe mine, evaluation: the nano world has hardly more than"),
        ({"prompts__shots": 10**6}, "recipe mine, prompts: --shots 1000000 is more than the"),
        ({"prompts__max_new_tokens": 5000}, "recipe mine, prompts: max_new_tokens 5000 leaves no room"),
        ({"engine": "vllm"}, "recipe mine, engine: is 'vllm'; it must be a mapping of settings"),
        ({"engine": {"engine": "hff"}}, "recipe mine, engine: unknown engine 'hff'; did you mean 'hf'"),
        ({"engine": {"dtype": "float99"}}, "recipe mine, prompts: unknown dtype 'float99'; did you mean 'float32'"),
        ({"engine": {"batch_size": "x"}}, "recipe mine, engine: batch_size is 'x'; it must be a whole number or null"),
        ({"engine": {"batch_size": 0}}, "recipe mine, engine: batch_size is 0, which is out of its bounds"),
        ({"engine": {"device": "cuda:99"}}, "recipe mine, engine: device 'cuda:99' is not usable here"),
        ({"engine": {"gpu_memory": 0.5}}, "recipe mine, prompts: the engine 'hf' takes no gpu_memory"),
        ({"seed": "abc"}, "recipe mine: seed is 'abc'; it must be a whole number"),
        ({"seed": 1.5}, "recipe mine: seed is 1.5; it must be a whole number"),
        ({"threads": True}, "recipe mine: threads is True; it must be a whole number"),
        ({"dpo": None}, "recipe mine, dpo: is empty; write dpo: {} for its defaults"),
        ({1: {}}, "recipe mine: unknown section 1; known: "),
        ({"seed": 2**32}, "recipe mine: seed is 4294967296; it must be at most 4294967295"),
        ({"threads": 10**13}, "recipe mine: threads is 10000000000000; it must be at most 4096"),
        ({"prompt_set": True}, "recipe mine: prompt_set is True; it must be a text: put quotes around it"),
        (
            {"comparisons__as_is_reward_model": "nano/reward"},
            "recipe mine, comparisons: as_is_reward_model names a reward model .* as_is_reward trains another",
        ),
        ({"reward__max_length": 8}, "recipe mine, reward: max_length 8 holds no dialogue: the shortest seed prompt"),
        ({"sft__max_length": 8}, "recipe mine, sft: max_length 8 holds no dialogue"),
        ({"dpo": {"max_length": 8}}, "recipe mine, dpo: max_length 8 holds no dialogue"),
        ({"engine": {"engine": "openai"}}, "the engine 'openai' needs an endpoint: give base_url"),
        ({"engine": {"engine": "openai", "base_url": "localhost:8000"}}, "base_url is not an http.* address"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = refused(tmp_path, changes)
    assert re.search(message, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nreward: {epochs: 1}\nseed: 2\n", "line 3: 'seed' stands there twice; keep one"),
        ("reward:\n  epochs: 1\n  model: a\n  epochs: 2\n", "line 4: 'epochs' stands there twice; keep one"),
        ("reward: &own\n  model: *own\n", "line 1: what the anchor there names holds itself"),
        ("seed: 010\nreward: {}\n", "line 1: YAML reads 010 as a number of base 8; write it in base 10"),
        ("reward:\n  epochs: 1:30\n", "line 2: YAML reads 1:30 as a number of base 60; write it in base 10"),
        ("description: nothing\n", "recipe mine has no stage; name one of prompts, responses"),
    ],
)
def test_what_yaml_would_take_in_silence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(InputError) as error:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["seed=010", "prompts={count: 1, count: 2}", "rlsf.kl_limit=1:30"])
def test_a_value_from_the_command_line_is_read_as_a_file_is(value: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(value))):
        load_recipe("nano", values=[value])


def test_numbers_that_people_write_are_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "seed: 0\nreward: {epochs: 0x2, seed: 1_000, learning_rate: 0.5, model: '010'}\n"
    )
    expected = {"epochs": 2, "seed": 1000, "learning_rate": 0.5, "model": "010"}
    assert load_recipe(str(tmp_path / "mine.yaml")).sections["reward"] == expected


def test_a_seed_of_the_command_line_has_the_same_bounds() -> None:
    with pytest.raises(InputError, match="seed is 4294967296; it must be at most 4294967295"):
        load_recipe("nano", seed=2**32)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_an_output_that_is_a_file_is_refused_first(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    pipeline = Pipeline(load_recipe("nano"), tmp_path / "file" / below)
    for begin in (pipeline.states, pipeline.run):
        with pytest.raises(InputError, match="file is a file; --output names the folder of a recipe's stages"):
            begin()
    assert (tmp_path / "file").read_text() == "mine"


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    content = "\ufeffreward: &own {model: a, seed: 1}\nsft: {<<: *own, seed: 2}\n"
    (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")).sections["sft"] == {"model": "a", "seed": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo": {"bta": 1}}, "recipe mine, dpo: unknown setting 'bta'; did you mean 'beta'"),
        ({"rlsf__batch_size": 10}, "recipe mine, rlsf: batch_size 10 is not a multiple of mini_batch_size"),
        ({"comparisons__ranking": ["large-good-5", "no-such"]}, "comparisons: the ranking names 'no-such'"),
        ({"evaluation__nano_prompts": "many"}, "recipe mine, evaluation: nano_prompts is 'many'"),
        ({"engine": {"batch_size": "x"}}, "recipe mine, engine: batch_size is 'x'"),
    ],
)
def test_plan_refuses_what_fails_on_any_machine(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(tmp_path, changes)
    result = CliRunner().invoke(cli, ["plan", str(tmp_path / "mine.yaml")])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_pairs_of_ones_own_are_read_as_the_stage_will(tmp_path: Path) -> None:
    row = {"prompt": "How big is it?", "chosen": "Big.", "rejected": "No.", "margin": 1.0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    message = refused(tmp_path, {"as_is_reward__comparisons": str(tmp_path / "pairs.jsonl")})
    assert "recipe mine, as_is_reward: 1 of 1 rows" in message
    assert "give --margin" in message


def test_a_dry_run_knows_until(tmp_path: Path) -> None:
    pipeline = Pipeline(load_recipe("nano"), tmp_path / "out")
    assert list(pipeline.states("responses")) == ["prompts", "responses"]
    with pytest.raises(InputError, match="recipe nano has no stage 'nope'"):
        pipeline.states("nope")


def test_too_little_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 16))
    assert "GiB of weights at one time" in refused(tmp_path, {"seed": 0})


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


def test_the_room_for_an_answer_is_what_the_shots_leave_that_a_stage_will_show() -> None:
    """The longest of a set may be drawn; where nothing is drawn, the first ones stand before every prompt."""
    conversations = tuple(
        (Message("user", "Why?"), Message("assistant", text)) for text in ("Yes.", "No. " * 90, "So.")
    )
    demonstrations = DemonstrationSet("", conversations)
    first, longest = (shots_text(demonstrations, 1, longest=longest) for longest in (False, True))
    assert "Yes." in first
    assert "No." not in first
    assert longest.count("No.") == 90
    assert "Yes." not in longest
