"""`--config FILE.yaml`: flags from a file, for every stage; flags on the command line win."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from almost_eval.errors import AlmostError, InputError
from almost_train.cli.main import cli
from almost_train.cli.settings import SettingsCommand
from almost_train.nano.data import write_votes

pytestmark = pytest.mark.usefixtures("one_thread")


def stages(group: click.Group, at: str = "") -> dict[str, SettingsCommand]:
    """Name -> every command that runs a stage."""
    found: dict[str, SettingsCommand] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= stages(command, f"{at}{name} ")
        elif isinstance(command, SettingsCommand):
            found[at + name] = command
    return found


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs a command with a config of these contents; returns what came of it."""

    def invoke(command: str, content: object, *arguments: str) -> Any:
        file = tmp_path / "mine.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return CliRunner().invoke(cli, [*command.split(), "--config", str(file), *arguments])

    return invoke


def test_a_stage_runs_from_a_file_alone_and_flags_win(run: Any, tmp_path: Path) -> None:
    comparisons = write_votes(tmp_path / "votes.jsonl", 12, wrong=0.0, seed=1)
    content = {
        "comparisons": str(comparisons),
        "policy": "nano/sft",
        "output": str(tmp_path / "out"),
        "learning-rate": "1e-4",
        "batch_size": 6,
        "micro_batch_size": 6,
        "max_length": 128,
        "device": "cpu",
        "lora_targets": ["q_proj", "v_proj"],
        "lora_rank": 2,
        "log_to": ["jsonl"],
    }
    done = run("dpo", content, "--batch-size", "12", "--json")
    assert done.exit_code == 0, done.output
    spec = json.loads((tmp_path / "out" / "stage.json").read_text())["settings"]
    assert (spec["batch_size"], spec["learning_rate"]) == (12, 1e-4)  # the flag's, the file's
    assert spec["lora_targets"] == ["q_proj", "v_proj"]
    assert spec["beta"] == 0.1  # neither's
    assert (tmp_path / "out" / "metrics.jsonl").is_file()


def test_every_stage_takes_one(run: Any) -> None:
    commands = stages(cli)
    assert {"reward", "sft", "rlsf", "dpo", "online-dpo", "self-play", "synthesize prompts"} <= commands.keys()
    for command in commands:
        failed = run(command, {"no_such_flag": 1})
        assert isinstance(failed.exception, InputError), command
        assert "has no option 'no_such_flag'" in str(failed.exception), command


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rat": 1e-4}, "mine.yaml: sft has no option 'learning_rat'; did you mean 'learning-rate'?"),
        ({"eval_evry": 5}, "did you mean 'eval-every'?"),
        ({"epochs": 1.5}, "mine.yaml: epochs: '1.5' is not a valid integer"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"bf16": "perhaps"}, "mine.yaml: bf16: 'perhaps' is not a valid boolean"),
        ({"optim": "adamw_8bits"}, "mine.yaml: optim: 'adamw_8bits' is not one of"),
        ({"epochs": [1, 2]}, "mine.yaml: epochs: takes one value, not a list"),
        ("epochs: 1\nepochs: 2", "mine.yaml: epochs stands there twice"),
        ("- a list", "holds no options"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(run: Any, tmp_path: Path, content: object, message: str) -> None:
    rest = ("--demonstrations", "none.jsonl", "--model", "nano/sft", "--output", str(tmp_path / "out"))
    failed = run("sft", content, *rest)
    assert isinstance(failed.exception, AlmostError), failed.output
    assert failed.exception.exit_code == 2
    assert message in str(failed.exception)
    assert not (tmp_path / "out").exists()
