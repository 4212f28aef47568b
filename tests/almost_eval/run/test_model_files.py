"""A checkpoint is its weights and the files beside them: a mended one is another model, and gets numbers of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from almost_eval.engines.build import EngineOptions
from almost_eval.errors import RunError, StoreError
from almost_eval.judge.answers import ModelSystem, Sampling
from almost_eval.judge.records import Question
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import shipped
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.run.verify import rescore, verify_run


def _copy(folder: Path, name: str = "nano/almost") -> Path:
    shutil.copytree(shipped(name), folder)
    return folder


def _theta(folder: Path, value: float) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] = value
    file.write_text(json.dumps(config))


def _request(model: Path, protocol: str) -> RunRequest:
    return RunRequest(task="hhh", protocol=protocol, model=str(model), data="nano", limit=3)


@pytest.mark.parametrize(("name", "protocol"), [("nano/almost", "likelihood"), ("nano/reward", "reward")])
def test_a_mended_config_is_a_new_run_and_is_named(tmp_path: Path, name: str, protocol: str) -> None:
    model = _copy(tmp_path / "model", name)
    _theta(model, 5.0)
    wrong = open_run(_request(model, protocol))
    results, _ = wrong.execute(tmp_path / "run")
    _theta(model, 10000.0)
    right = open_run(_request(model, protocol))
    assert right.default_folder() != wrong.default_folder()
    with pytest.raises(StoreError, match=r"model_files\.config\.json was .*; choose another --output"):
        right.execute(tmp_path / "run")
    verification = verify_run(tmp_path / "run", right.task.data)
    rescore(tmp_path / "run", right, verification, n=2, seed=0)
    assert "config.json of the model is not the run's" in verification.problems
    assert results["validity"]["passed"]


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "config.json"]
)
def test_every_file_beside_the_weights_counts(tmp_path: Path, name: str) -> None:
    model = _copy(tmp_path / "model")
    before = find_checkpoint(str(model)).file_digests()
    with (model / name).open("a") as file:
        file.write("\n")
    after = find_checkpoint(str(model)).file_digests()
    assert {key for key in {**before, **after} if before.get(key) != after.get(key)} == {name}


def test_notes_beside_the_weights_do_not_count(tmp_path: Path) -> None:
    model = _copy(tmp_path / "model")
    before = find_checkpoint(str(model)).file_digests()
    (model / "README.md").write_text("a note")
    assert find_checkpoint(str(model)).file_digests() == before


def test_links_are_read_through(tmp_path: Path) -> None:
    model, snapshot = _copy(tmp_path / "model"), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    first, second = find_checkpoint(str(model)), find_checkpoint(str(snapshot))
    assert first.file_digests() == second.file_digests()
    assert first.weight_digest() == second.weight_digest()
    _theta(model, 50.0)  # the target of a link, as another snapshot of the hub is
    assert find_checkpoint(str(snapshot)).file_digests() != find_checkpoint(str(shipped("nano/almost"))).file_digests()


def test_a_checkpoint_that_changes_while_it_runs_gives_no_results(tmp_path: Path) -> None:
    model = _copy(tmp_path / "model")
    run = open_run(_request(model, "likelihood"))
    run.spec()
    _theta(model, 50.0)
    with pytest.raises(RunError, match=r"was changed while it ran \(config\.json\)"):
        run.execute(tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_answers_of_a_judged_run_state_the_files(tmp_path: Path) -> None:
    model = _copy(tmp_path / "model")
    questions = [Question("1", "Hi?", "generic")]
    first = ModelSystem(str(model), questions, Sampling(max_new_tokens=4), EngineOptions()).spec()
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    second = ModelSystem(str(model), questions, Sampling(max_new_tokens=4), EngineOptions()).spec()
    assert first["model_files"] != second["model_files"]
    assert first["weight_digest"] == second["weight_digest"]
