"""The folder of a stage: done, resumed or refused."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from almost_eval.errors import DataError, InputError, RunError, StoreError
from almost_train.common.config import option
from almost_train.common.stage import Stage, StageChanged


@dataclass(frozen=True, slots=True)
class Settings:
    seed: int = option(0, "Seed.")
    device: str = option("auto", "Where.")


def test_a_stage_is_done_once_its_result_is_there(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    folder = tmp_path / "stage"
    with Stage(folder, "reward", Settings(), {"rows": source, "model": "nano/vanilla-small"}) as stage:
        assert stage.result is None
        (folder / "out.jsonl").write_text("{}\n")
        result = stage.finish({"accuracy": 0.5}, {"out": folder / "out.jsonl"})
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["outputs"]["out"]["path"] == "out.jsonl"
    moved = tmp_path / "moved.jsonl"
    source.rename(moved)  # the same content elsewhere, on another device: the same stage
    inputs: dict[str, Path | str] = {"rows": moved, "model": "nano/vanilla-small"}
    with Stage(folder, "reward", Settings(device="cpu"), inputs) as stage:
        assert stage.result == result


def test_other_settings_inputs_or_stages_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    folder = tmp_path / "stage"
    with Stage(folder, "reward", Settings(), {"rows": source}):
        pass
    with pytest.raises(StoreError, match=r"made with other settings \(seed was 0, is 1\)"):
        Stage(folder, "reward", Settings(seed=1), {"rows": source}).__enter__()
    with pytest.raises(StoreError, match="holds the stage 'reward', not 'sft'"):
        Stage(folder, "sft", Settings(), {"rows": source}).__enter__()
    source.write_text("{} \n")
    with pytest.raises(StoreError, match=r"made with other inputs \(rows\)"):
        Stage(folder, "reward", Settings(), {"rows": source}).__enter__()
    with pytest.raises(DataError, match="is not there"):
        Stage(folder, "reward", Settings(), {"rows": tmp_path / "none"})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"holds files but no stage\.json"):
        Stage(tmp_path, "reward", Settings()).__enter__()
    with pytest.raises(StoreError, match="is a file"):
        Stage(tmp_path / "thesis.tex", "reward", Settings()).__enter__()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    held, other = (Stage(tmp_path / "stage", "reward", Settings()) for _ in range(2))
    with held, pytest.raises(StoreError, match="in use by another process"):
        other.__enter__()
    with Stage(tmp_path / "stage", "reward", Settings()) as stage:
        assert stage.result is None


def test_a_refused_command_leaves_the_folder_free(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    with pytest.raises(InputError), Stage(folder, "reward", Settings(seed=1)):
        raise InputError("no such model")
    with Stage(folder, "reward", Settings(seed=2)):
        (folder / "log.jsonl").write_text("{}\n")
    with pytest.raises(InputError), Stage(folder, "reward", Settings(seed=2)):
        raise InputError("no such model")
    with pytest.raises(StageChanged, match="seed was 2, is 3") as changed:  # there is work in it
        Stage(folder, "reward", Settings(seed=3)).__enter__()
    assert changed.value.change == "settings (seed was 2, is 3)"


def test_what_a_stage_settles_inside_is_held_to(tmp_path: Path) -> None:
    from almost_train.synthetic.prompts import PromptSettings

    settings = PromptSettings()
    with Stage(tmp_path / "s", "made", settings) as stage:
        stage.pin("dtype of model", "float32")
        stage.pin("dtype of other", "bfloat16")
    with Stage(tmp_path / "s", "made", settings) as stage:
        stage.pin("dtype of model", "float32")
        with pytest.raises(StageChanged, match="dtype of model was 'float32', is 'bfloat16'"):
            stage.pin("dtype of model", "bfloat16")


@pytest.mark.parametrize("name", ["micro_batch_size", "gradient_checkpointing", "device", "save_minutes"])
def test_a_stage_goes_on_in_less_memory_and_on_another_device(name: str, tmp_path: Path) -> None:
    from almost_train.sft.run import SFTSettings

    other = {"micro_batch_size": 1, "gradient_checkpointing": True, "device": "cpu", "save_minutes": 0.0}[name]
    with Stage(tmp_path / "sft", "sft", SFTSettings()):
        pass
    with Stage(tmp_path / "sft", "sft", dataclasses.replace(SFTSettings(), **{name: other})) as stage:  # type: ignore[arg-type]
        assert stage.result is None


@contextmanager
def small_files() -> Iterator[None]:
    """Inside, no file may grow beyond 10,000 bytes: a disk that is full, as the writer sees it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _python(file: Path) -> None:
    file.write_bytes(bytes(100_000))


def _safetensors(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(25_000)}, file)


def _torch(file: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(25_000)}, file)


@pytest.mark.parametrize("write", [_python, _safetensors, _torch])
def test_a_full_disk_is_one_line(write: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    with pytest.raises(RunError, match=r"cannot write to .*stage \(.+\); make room: what was saved"):  # noqa: SIM117
        with Stage(folder, "reward", Settings()), small_files():
            write(folder / "checkpoint")
    with Stage(folder, "reward", Settings()) as stage:  # released, and the same stage
        assert stage.result is None
