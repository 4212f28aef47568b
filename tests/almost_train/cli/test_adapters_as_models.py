"""Every command that takes a model takes a PEFT adapter folder: each is run on one, from its flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import almost_train as almost_train_package
from almost_eval.cli.main import cli as almost_eval
from almost_eval.files import read_rows, write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_train.cli.main import cli as almost_train
from almost_train.common.lora import LoraSettings, add_lora
from almost_train.common.templates import keep_template
from almost_train.reward.run import RewardSettings, load_classifier
from almost_train.rlsf.models import load_policy
from serving.models import find_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NANO = "--prompt-set nano --temperature 1.0"
SMALL = "--batch-size 4 --micro-batch-size 4 --device cpu"


def save(model: Any, base: str, folder: Path) -> Path:
    """The model's adapter, which changes something, with the tokenizer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(find_checkpoint(base, architectures=("ForCausalLM", "SequenceClassification")))
    keep_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = find_checkpoint("nano/sft")
    whole = add_lora(load_policy(base, "cpu"), LoraSettings(lora_rank=4), base.path, kind="CAUSAL_LM", seed=0)
    return save(whole, "nano/sft", tmp_path_factory.mktemp("adapters") / "policy")


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, settings = find_checkpoint("nano/vanilla-medium"), RewardSettings(lora_rank=4)
    whole = add_lora(load_classifier(base, settings), settings, base.path, kind="SEQ_CLS", seed=0)
    return save(whole, "nano/vanilla-medium", tmp_path_factory.mktemp("adapters") / "reward")


@pytest.fixture
def data(tmp_path: Path, policy: Path) -> Path:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    animals = "otter panther owl fox bear wolf hare lynx".split()
    asked = [f"How big is the {animal}?" for animal in animals]
    good, bad = turn("assistant", "It is big."), turn("assistant", "no idea")
    write_rows(tmp_path / "prompts.jsonl", [{"id": text[15:-1], "prompt": text} for text in asked])
    write_rows(tmp_path / "dialogues.jsonl", [{"messages": [turn("user", text), good]} for text in asked])
    pairs = [{"prompt": [turn("user", text)], "chosen": [good], "rejected": [bad]} for text in asked]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    configurations = [
        {"name": "five", "model": str(policy), "demonstrations": "good", "shots": 2},
        {"name": "one", "model": str(policy), "demonstrations": "weak", "shots": 1},
    ]
    (tmp_path / "configurations.yaml").write_text(yaml.safe_dump(configurations), encoding="utf-8")
    (tmp_path / "ranking.yaml").write_text("- five\n- one\n", encoding="utf-8")
    return tmp_path


def run(cli: Any, command: str, **places: Path) -> None:
    result = CliRunner().invoke(cli, command.format(**places).split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_synthesis(data: Path, policy: Path, reward: Path) -> None:
    flags = "--count 2 --overlap 1.0 --min-characters 1 --max-new-tokens 12 --accept-fewer --max-rounds 1"
    run(almost_train, f"synthesize prompts --model {policy} {NANO} {flags} --output {data}/mined")
    run(
        almost_train,
        f"synthesize responses --prompts {data}/prompts.jsonl --configurations {data}/configurations.yaml {NANO} "
        f"--max-new-tokens 12 --min-characters 1 --rules other_turn --output {data}/responses",
    )
    assert len(read_rows(data / "responses" / "five.jsonl")) == 8
    run(
        almost_train,
        f"synthesize comparisons --responses {data}/responses --ranking {data}/ranking.yaml --no-length-rule "
        f"--as-is-reward-model {reward} --output {data}/comparisons",
    )


def test_self_play(data: Path, policy: Path, reward: Path) -> None:
    run(
        almost_train,
        f"self-play --prompts {data}/prompts.jsonl --assistant-model {policy} --user-model {policy} --reward-model "
        f"{reward} {NANO} --assistant-demonstrations good --user-demonstrations good --max-turns 1 --candidates 2 "
        f"--max-new-tokens 12 --output {data}/play",
    )
    assert json.loads((data / "play" / "result.json").read_text())["stage"] == "self_play"


@pytest.mark.parametrize("lora", ["", "--lora-rank 2"])
def test_training(lora: str, data: Path, policy: Path, reward: Path) -> None:
    run(almost_train, f"sft --demonstrations {data}/dialogues.jsonl --model {policy} {SMALL} {lora} --output {data}/s")
    for number, model in enumerate((policy, reward)):
        target = data / f"r{number}"
        run(almost_train, f"reward --comparisons {data}/pairs.jsonl --model {model} {SMALL} {lora} --output {target}")
        assert json.loads((target / "result.json").read_text())["metrics"]["eval"]["pairs"] == 1
    run(
        almost_train,
        f"rlsf --prompts {data}/prompts.jsonl --policy {policy} --reward-model {reward} --steps 1 --mini-batch-size 4 "
        f"--max-new-tokens 8 {SMALL} {lora} --output {data}/ppo",
    )
    assert read_rows(data / "ppo" / "log.jsonl")[0]["kl"] == 0.0


def test_a_recipe_with_adapters_passes_its_checks(data: Path, policy: Path) -> None:
    recipe = yaml.safe_load((Path(almost_train_package.__file__).parent / "recipes" / "nano.yaml").read_text())
    recipe["prompts"]["model"] = str(policy)
    for configuration in recipe["responses"]["configurations"]:
        configuration["model"] = str(policy)
    for stage in ("as_is_reward", "reward", "sft"):
        recipe[stage] |= {"model": str(policy), "lora_rank": 4}
    recipe["self_play"] |= {"assistant_model": str(policy), "user_model": str(policy)}
    recipe["rlsf"] |= {"lora_rank": 4}
    recipe["evaluation"] |= {"vanilla": str(policy)}
    (data / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(almost_train, f"run {data}/recipe.yaml --dry-run --output {data}/run")


def test_evaluation_and_serving(data: Path, policy: Path, reward: Path) -> None:
    run(almost_eval, f"hhh --model {policy} --data nano --limit 2 --output {data}/hhh")
    run(almost_eval, f"hhh --protocol reward --model {reward} --data nano --limit 2 --output {data}/hhh-reward")
    run(
        almost_eval,
        f"tax --before nano/sft --after {policy} --reward-model {reward} --prompts {data}/prompts.jsonl --data nano "
        f"--limit 2 --max-new-tokens 8 --output {data}/tax",
    )
    assert find_model("policy", str(policy)).checkpoint.adapter is not None
    run(almost_train, f"merge {policy} --output {data}/merged")
    assert find_checkpoint(str(data / "merged")).adapter is None
