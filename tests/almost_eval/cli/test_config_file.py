"""`--config`: the same names as the flags, the command line wins, and what is recorded needs no file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from almost_eval.cli.config_file import spelled_out
from almost_eval.cli.main import cli

Command = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "options.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def leaves(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield command


def test_every_command_has_it() -> None:
    for command in leaves(cli):
        assert "config" in {param.name for param in command.params}, command.name


@pytest.mark.parametrize("command", [("hhh",), ("judge", "report")])
def test_help_shows_it(command: tuple[str, ...], almost_eval: Command) -> None:
    assert "--config FILE.yaml" in almost_eval(*command, "--help").out


def test_it_is_as_if_the_flags_were_given(almost_eval: Command, config: Callable[[str], Path], tmp_path: Path) -> None:
    file = config(
        "# a comment\nmetrics: [mc1]\nlimit: 2\nmax_length: 1024\nshare-prefixes: no\n"
        "allow:\n  - missing=0.5\n  - truncated=0.2\njson: true\nseed: 007\n"
    )
    done = almost_eval("truthfulqa", "--config", file, "--output", tmp_path / "run", "--seed", 3)
    assert (done.code, done.err) == (0, "")
    results, spec = json.loads(done.out), json.loads((tmp_path / "run/spec.json").read_text())
    assert spec["settings"] == {"metrics": ["mc1"], "limit": 2}
    assert (spec["engine"]["context_length"], spec["engine"]["share_prefixes"], spec["seed"]) == (1024, False, 3)
    allowed = {name: check["allowed"] for name, check in results["validity"]["checks"].items()}
    assert (allowed["missing"], allowed["truncated"]) == (0.5, 0.2)
    # The command on record names no file, and gives the same run: the folder takes it up, and nothing is computed.
    assert spec["command"] == [
        "almost-eval", "truthfulqa", "--metrics", "mc1", "--limit", "2", "--max-length", "1024", "--no-share-prefixes",
        "--allow", "missing=0.5", "--allow", "truncated=0.2", "--json", "--seed", "007",
        "--output", str(tmp_path / "run"), "--seed", "3",
    ]  # fmt: skip
    again = almost_eval(*spec["command"][1:])
    assert json.loads(again.out) == results


def test_a_run_without_a_file_records_what_was_typed(almost_eval: Command, tmp_path: Path) -> None:
    typed = ["hhh", "--limit", "1", "--output", str(tmp_path / "run")]
    almost_eval(*typed)
    assert json.loads((tmp_path / "run/spec.json").read_text())["command"] == ["almost-eval", *typed]


def test_a_repeated_flag_is_replaced_not_added_to() -> None:
    command = cli.commands["hhh"]
    context = click.Context(command, info_name="hhh", parent=click.Context(cli, info_name="almost-eval"))
    (allow,) = (param for param in command.params if param.name == "allow")
    assert isinstance(allow, click.Option)
    argv = ["almost-eval", "hhh", "--allow=missing=0.1", "--config=a.yaml", "--limit", "2"]
    assert spelled_out(argv, context, {allow: ("missing=0.5",)}) == [*argv[:3], *argv[4:]]
    other = ["pytest", "tests", "--config", "a.yaml"]  # not this command line: it is left alone
    assert spelled_out(other, context, {allow: ("missing=0.5",)}) is other


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("limt: 2", "options.yaml: hhh has no option 'limt'; did you mean 'limit'? known: "),
        ("limit: two", "options.yaml: limit: 'two' is not a valid integer range. (see --help)"),
        ("limit: 0", "options.yaml: limit: 0 is not in the range x>=1"),
        ("dry-run: perhaps", "options.yaml: dry-run: 'perhaps' is not a valid boolean"),
        ("limit: [1, 2]", "options.yaml: limit: takes one value, not a list"),
        ("model: {name: a}", "options.yaml: model: is nested"),
        ("model:", "options.yaml: model: has no value; leave it out, or give one"),
        ("limit: 1\nlimit: 2", "options.yaml: limit stands there twice; keep one"),
        ("batch-size: 1\nbatch_size: 2", "options.yaml: 'batch_size' and another key set one option; keep one"),
        ("- limit", "options.yaml holds no options; write one a line, as in limit: 10"),
        ("a: [", "options.yaml is not YAML: while parsing a flow"),
        ("config: other.yaml", "hhh has no option 'config'"),
        ("protocol: chioce", "unknown protocol 'chioce'; did you mean 'choice'?"),
    ],
)
def test_refused_in_one_line(text: str, expected: str, almost_eval: Command, config: Callable[[str], Path]) -> None:
    code, out, err = almost_eval("hhh", "--config", config(text))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_a_missing_file(almost_eval: Command) -> None:
    code, _, err = almost_eval("hhh", "--config", "nowhere.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "--config nowhere.yaml cannot be read (No such file or directory)" in err


def test_an_empty_file_changes_nothing(almost_eval: Command, config: Callable[[str], Path]) -> None:
    assert almost_eval("list", "--config", config("# nothing\n")).code == 0
