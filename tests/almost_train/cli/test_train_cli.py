"""`almost-train` as a user meets it: help, refusals in one line, one stage through its flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from machine_time import seconds_taken

from almost_eval.cli.options import GENERATION_FIELDS
from almost_eval.errors import AlmostError
from almost_eval.files import read_rows
from almost_eval.nano.oracle import scores_by_dimension
from almost_train.cli.main import cli, main
from almost_train.nano.data import write_prompts, write_votes

COMMANDS = (
    "synthesize prompts",
    "synthesize responses",
    "synthesize comparisons",
    "reward",
    "self-play",
    "sft",
    "rlsf",
    "dpo",
    "online-dpo",
    "run",
    "nano pretrain",
)


def almost_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "almost_train.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_is_instant() -> None:
    program = [sys.executable, "-m", "almost_train.cli", "--help"]
    assert min(seconds_taken(program, holds="Usage: ") for _ in range(3)) <= 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_a_working_example(command: str) -> None:
    shown = CliRunner().invoke(cli, [*command.split(), "--help"])
    assert shown.exit_code == 0, shown.output
    assert f"almost-train {command}" in shown.output
    example = shown.output.partition("Example:")[2].partition("Options:")[0]
    flags = [word for word in example.split() if word.startswith("--")]
    options = shown.output.partition("Options:")[2]
    assert all(flag in options for flag in flags), flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rewards"], "unknown command or task 'rewards'; did you mean 'reward'?"),
        (["run", "nan"], "no recipe 'nan'; did you mean 'nano'?"),
        (["reward", "--comparisons", "none.jsonl", "--model", "nano/vanilla-small", "--output", "x"], "none.jsonl"),
        (["reward", "--comparisons", "none.jsonl", "--model", "nano/vanila-small", "--output", "x"], "did you mean"),
        (["nano", "pretrain", "--sizes", "smal", "--output", "x"], "unknown size 'smal'; did you mean 'small'?"),
        (["sft", "--epochs", "0", "--demonstrations", "d", "--model", "m", "--output", "x"], "epochs is 0"),
        (["self-play", "--data-parallel-size", "0"], "0 is not in the range x>=1"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["almost-train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capfd.readouterr().err
    assert ended.value.code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.rglob("result.json"))


def test_flags_reach_the_stage(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3, pool="train", seed=0)
    (tmp_path / "configurations.yaml").write_text(
        "- {name: small, model: nano/vanilla-small, demonstrations: good, shots: 1}\n", encoding="utf-8"
    )
    arguments = ["synthesize", "responses", "--prompts", str(prompts), "--prompt-set", "nano"]
    arguments += ["--configurations", str(tmp_path / "configurations.yaml"), "--output", str(tmp_path / "out")]
    arguments += ["--max-new-tokens", "12", "--min-characters", "1", "--temperature", "0", "--batch-tokens", "256"]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["metrics"]["configurations"]["small"]
    spec = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert spec["settings"]["max_new_tokens"] == 12
    assert spec["settings"]["temperature"] == 0
    assert [row["id"] for row in read_rows(tmp_path / "out" / "small.jsonl")] == [r["id"] for r in read_rows(prompts)]
    again = CliRunner().invoke(cli, arguments)  # done: the table again, in no time
    assert again.exit_code == 0
    assert "configurations/small" in again.output


def test_an_option_of_another_engine_is_refused(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 1, pool="train", seed=0)
    arguments = ["self-play", "--prompts", str(prompts), "--unguided", "--prompt-set", "nano", "--output"]
    arguments += [str(tmp_path / "out"), "--assistant-demonstrations", "good", "--user-demonstrations", "good"]
    done = CliRunner().invoke(cli, [*arguments, "--tensor-parallel-size", "2"])
    assert isinstance(done.exception, AlmostError | click.ClickException)
    assert "takes no tensor_parallel_size" in str(done.exception)


@pytest.mark.parametrize("command", ["synthesize prompts", "synthesize responses", "self-play"])
def test_what_generates_has_every_option_of_the_engine(command: str) -> None:
    shown = CliRunner().invoke(cli, [*command.split(), "--help"]).output
    assert all(f"--{name.replace('_', '-')} " in shown for name in GENERATION_FIELDS)
    assert {"base_url", "kv_cache_gib", "allow_pickle"} <= GENERATION_FIELDS.keys()


def test_votes_are_wrong_as_often_as_asked(tmp_path: Path) -> None:
    rows = read_rows(write_votes(tmp_path / "votes.jsonl", 600, wrong=0.25, seed=1))
    assert rows == read_rows(write_votes(tmp_path / "again.jsonl", 600, wrong=0.25, seed=1))
    found = []
    for row in rows:
        prompt = row["prompt"][0]["content"]
        better, worse = (
            scores_by_dimension(prompt, row[key][0]["content"])["oracle"] for key in ("chosen", "rejected")
        )
        assert better is not None
        assert worse is not None
        if better != worse:
            found.append(better > worse)
    assert len(found) > 450
    # 75 % but for pairs of levels on which the oracle and the voter's rule (the level) differ.
    assert 0.62 < sum(found) / len(found) < 0.80


def test_the_oracle_has_no_word_on_what_is_not_of_its_world() -> None:
    assert set(scores_by_dimension("What is the capital of France?", "Paris.").values()) == {None}
    assert scores_by_dimension("How can I steal the bike?", "I will not help with that.")["oracle"] is not None
