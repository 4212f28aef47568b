"""Settings from YAML and from flags: the same names, bounds and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from almost_eval.errors import InputError
from almost_train.cli.settings import settings_flag
from almost_train.common.config import option, settings_from, settings_of, settings_to_dict


@dataclass(frozen=True, slots=True)
class Settings:
    learning_rate: float = option(2e-5, "Peak.", above=0)
    epochs: int = option(1, "Passes.", least=1, most=10)
    scheduler: str = option("cosine", "Shape.", choices=("cosine", "linear"))
    bf16: bool = option(False, "Half precision.")
    stop: tuple[str, ...] = option((), "Stop strings.")
    evaluation: Path | None = option(None, "File.")
    limit: int | None = option(None, "Rows.", least=1)


def test_defaults_and_values() -> None:
    assert settings_from(Settings, {}, "recipe") == Settings()
    given = {"learning-rate": 1, "epochs": 3, "stop": ["a", "b"], "evaluation": "x.jsonl", "limit": None}
    found = settings_from(Settings, given, "recipe")
    assert found == Settings(learning_rate=1.0, epochs=3, stop=("a", "b"), evaluation=Path("x.jsonl"))
    assert settings_to_dict(found) == {
        "learning_rate": 1.0,
        "epochs": 3,
        "scheduler": "cosine",
        "bf16": False,
        "stop": ["a", "b"],
        "evaluation": "x.jsonl",
        "limit": None,
    }


def test_yaml_reads_2e_5_as_a_text() -> None:
    import yaml

    given = yaml.safe_load("learning_rate: 2e-5")
    assert given == {"learning_rate": "2e-5"}
    assert settings_from(Settings, given, "recipe").learning_rate == 2e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, "recipe, reward: unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"bf16": True, "learning-rate": 1, "learning_rate": 2}, "learning_rate stands there twice, with - and with _"),
        ({"epochs": 0}, "recipe, reward: epochs is 0; it must be at least 1"),
        ({"epochs": 11}, "it must be at most 10"),
        ({"epochs": 1.5}, "epochs is 1.5; it must be a whole number"),
        ({"epochs": True}, "epochs is True; it must be a whole number"),
        ({"epochs": None}, "epochs is empty; it must be a whole number"),
        ({"learning_rate": 0}, "it must be above 0"),
        ({"learning_rate": float("nan")}, "it must be finite"),
        ({"learning_rate": "fast"}, "it must be a number"),
        ({"scheduler": "cosin"}, "did you mean 'cosine'?"),
        ({"bf16": 1}, "bf16 is 1; it must be true or false"),
        ({"stop": "a"}, "stop is 'a'; it must be a list"),
        ({"stop": [1]}, "it must be a text"),
        ({"evaluation": 3}, "it must be a path"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        settings_from(Settings, given, "recipe, reward")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flags() -> None:
    collected: list[Settings] = []

    def collect(**flags: object) -> None:
        collected.append(settings_from(Settings, flags, "reward"))

    command = click.Command("reward", params=list(map(settings_flag, settings_of(Settings).values())), callback=collect)
    arguments = ["--learning-rate", "1e-4", "--bf16", "--stop", "a", "--stop", "b", "--evaluation", "x", "--limit", "3"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert CliRunner().invoke(command, []).exit_code == 0
    wanted = Settings(learning_rate=1e-4, bf16=True, stop=("a", "b"), evaluation=Path("x"), limit=3)
    assert collected == [wanted, Settings()]
    help = CliRunner().invoke(command, ["--help"]).output
    assert "--learning-rate FLOAT" in help
    assert "[cosine|linear]" in help
    assert "2e-05" in help
