"""Flags made from a settings dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
from click.testing import CliRunner

from almost_train.cli.settings import settings_flag
from almost_train.common.config import option, settings_from, settings_of


@dataclass(frozen=True, slots=True)
class Settings:
    learning_rate: float = option(2e-5, "Peak.", above=0)
    epochs: int = option(1, "Passes.", least=1, most=10)
    scheduler: str = option("cosine", "Shape.", choices=("cosine", "linear"))
    bf16: bool = option(False, "Half precision.")
    stop: tuple[str, ...] = option((), "Stop strings.")
    evaluation: Path | None = option(None, "File.")
    limit: int | None = option(None, "Rows.", least=1)


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
