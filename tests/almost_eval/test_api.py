"""The five names: light to import, and the same numbers as the commands."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import almost_eval as package
from almost_eval.errors import InputError, StoreError
from almost_eval.types import Message


def test_five_names() -> None:
    assert package.__all__ == ["HFEngine", "RewardModel", "compare", "evaluate", "load_run"]
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        package.evaluat  # noqa: B018


def test_importing_it_is_light() -> None:
    code = "import sys\nimport almost_eval\nprint(*{m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if not name.startswith("__editable__")}
    assert loaded <= {"__main__", "_distutils_hack", "sitecustomize", "usercustomize", "almost_eval"}


def test_no_module_hides_a_name() -> None:
    """Importing `almost_eval.x` sets the attribute `x` of the package: no file may bear the name of a function."""
    files = {path.stem for path in Path(package.__file__ or "").parent.glob("*.py")}
    assert not files & set(package.__all__)


@pytest.fixture(scope="module")
def engine() -> Any:
    return package.HFEngine("nano/almost")


def test_evaluate_is_the_command(
    engine: Any, almost_eval: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = package.evaluate("nano/almost", "hhh", limit=3)
    (folder,) = tmp_path.glob("runs/hhh-choice-almost-*")
    assert run.folder.resolve() == folder
    assert len(run.samples) == run.spec["n_samples"]
    command = json.loads(almost_eval("hhh", "--limit", 3, "--json").out)
    assert command == run.results  # one folder: the command found everything done
    shared = package.evaluate(engine, "hhh", limit=3, output="other")
    assert shared.results["metrics"] == run.results["metrics"]


def test_settings_of_the_task_and_of_the_engine(tmp_path: Path) -> None:
    run = package.evaluate(
        "nano/almost",
        "mmlu",
        subjects=["nano_food"],
        shots=1,
        limit=2,
        batch_tokens=256,
        output=tmp_path,
        allow={"missing": 0.5},
    )
    assert run.spec["settings"] == {"subjects": ["nano_food"], "shots": 1, "limit": 2}
    assert run.spec["engine"]["batch_tokens"] == 256
    assert run.results["validity"]["checks"]["missing"]["allowed"] == 0.5


def test_compare_and_load(engine: Any, tmp_path: Path) -> None:
    tuned = package.evaluate(engine, "hhh-likelihood", limit=3, output=tmp_path / "tuned")
    base = package.evaluate("nano/vanilla-medium", "hhh-likelihood", limit=3, output=tmp_path / "base")
    found = package.compare(base, tuned)
    assert found.shared == len(tuned.samples)
    assert found == package.compare(str(base.folder), tuned.folder)
    loaded = package.load_run(str(tuned.folder))
    assert loaded == tuned
    assert found.metrics[0].mean_b == pytest.approx(loaded.results["metrics"]["accuracy"]["value"])


def test_a_reward_model(tmp_path: Path) -> None:
    model = package.RewardModel("nano/reward")
    asked = Message("user", "What does the otter eat?")
    good, bad = model.score([(asked, Message("assistant", text)) for text in ("The otter eats insects.", "Go away.")])
    assert good > bad
    run = package.evaluate(model, "hhh-reward", limit=2, output=tmp_path)
    assert run.spec["requires"] == "reward"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"task": "hhhh"}, "unknown task 'hhhh'; did you mean 'hhh'?"),
        ({"task": "mmlu", "shot": 1}, "mmlu has no setting 'shot'; did you mean 'shots'?"),
        ({"task": "hhh", "shots": 1}, "hhh has no setting 'shots'"),
        ({"task": "hhh-reward"}, "hhh-reward asks a RewardModel, and was given a HFEngine"),
        ({"task": "hhh", "dtype": "float32"}, "dtype belongs to a model that is yet to be opened"),
        ({"task": "harness"}, "harness: name tasks, as in tasks=.*lm-eval's names"),
        ({"task": "hhh", "allow": {"nonsense": 1}}, "unknown check 'nonsense'"),
    ],
)
def test_refused(arguments: dict[str, Any], expected: str, engine: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        package.evaluate(engine, **arguments, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not there"):
        package.load_run(tmp_path)
