"""Files of a run that somebody edited: a value of another kind is named in one line, before anything is made of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from almost_eval.api import evaluate
from almost_eval.cli.main import cli
from almost_eval.errors import StoreError

STRANGE: list[Any] = [None, 3, "x", [], {}, [1, 2], {"q": 1}, True, 1.5, "\x00", [None], {"q": None}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "almost"
    evaluate("nano/almost", "hhh", limit=2, output=folder)
    return folder


def places(value: Any, depth: int, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if at:
        yield at
    if isinstance(value, dict) and depth:
        for key in value:
            yield from places(value[key], depth - 1, (*at, key))


def changed(value: dict[str, Any], at: tuple[str, ...], strange: Any) -> dict[str, Any]:
    copy = inner = json.loads(json.dumps(value))
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = strange
    return dict(copy)


def outcome(*words: object) -> tuple[int, str]:
    """Exit code and message, as the command's users see them; anything that was not foreseen is raised."""
    result = CliRunner().invoke(cli, [str(word) for word in words])
    if isinstance(result.exception, StoreError):
        return result.exception.exit_code, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("name", ["spec.json", "results.json"])
def test_any_value_of_another_kind_is_shown_or_refused_in_one_line(whole: Path, tmp_path: Path, name: str) -> None:
    run, refused = tmp_path / "edited", 0
    shutil.copytree(whole, run)
    original = json.loads((whole / name).read_text())
    for place, at in enumerate(places(original, 2)):
        strange = STRANGE[place % len(STRANGE)], STRANGE[(place + 5) % len(STRANGE)]
        for value in strange:
            (run / name).write_text(json.dumps(changed(original, at, value)))
            code, message = outcome("report", run, "--output", tmp_path / "page.html")
            assert code in (0, 2), (at, value, message)
            if code == 2:
                assert "\n" not in message, message
                assert name in message, message
            refused += code == 2
    assert refused > 10


@pytest.mark.parametrize(
    ("name", "at", "value", "says"),
    [
        ("spec.json", ("template",), "almost", "template should be"),
        ("spec.json", ("data", "fingerprint"), 3, "data.fingerprint should be a valid string"),
        ("spec.json", ("n_samples",), "8", "n_samples should be a valid integer"),
        ("results.json", ("metrics", "accuracy", "n"), None, "metrics.accuracy.n should be a valid integer"),
        ("results.json", ("validity", "passed"), "yes", "validity.passed should be a valid boolean"),
        ("results.json", ("headline",), "f1", "the headline 'f1' is none of its metrics"),
    ],
)
def test_the_field_is_named(whole: Path, tmp_path: Path, name: str, at: tuple[str, ...], value: Any, says: str) -> None:
    run = tmp_path / "edited"
    shutil.copytree(whole, run)
    (run / name).write_text(json.dumps(changed(json.loads((whole / name).read_text()), at, value)))
    code, message = outcome("verify", run)
    assert (code, says in message) == (2, True), message


def test_a_run_that_goes_on_looks_first(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "edited"
    shutil.copytree(whole, run)
    spec = json.loads((whole / "spec.json").read_text())
    (run / "spec.json").write_text(json.dumps(spec | {"template": ["almost"]}))
    with pytest.raises(StoreError, match=r"template should be .*put back a whole copy of the file"):
        evaluate("nano/almost", "hhh", limit=2, output=run)
