"""A run that ended or was killed goes on with more steps: to the bits of one that was never stopped, or it says so."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stopping import StopAfter, Stopped

from almost_eval.errors import StoreError
from almost_eval.files import read_json, read_rows
from almost_eval.progress import PipeProgress
from almost_train.common.stage import STATE, Stage
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import as_never_stopped, rlsf

pytestmark = pytest.mark.usefixtures("one_thread")

PPO = RLSFSettings(
    steps=4,
    batch_size=8,
    mini_batch_size=4,
    micro_batch_size=4,
    ppo_epochs=2,
    max_new_tokens=8,
    learning_rate=1e-4,
    warmup_ratio=0.0,
    guard_window=0,
    kl_limit=1000.0,
    samples_every=1,
    save_every=3,
    device="cpu",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ("Where does the otter live?", "What does the owl eat?", "Hello", "How big is the fox?")
    rows = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(texts)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"prompts": prompts, "policy": "nano/sft", "reward_model": "nano/reward"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read_rows(folder / "log.jsonl")]


def same_output(one: Path, other: Path) -> None:
    for name in ("policy/model.safetensors", "samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows_of(one) == rows_of(other)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_run_that_ended_goes_on_to_the_bits_of_a_longer_one(
    algorithm: str, world: dict[str, Any], tmp_path: Path
) -> None:
    chosen = PPO
    if algorithm != "ppo":
        default = RLSFSettings()
        own: dict[str, Any] = {
            "mini_batch_size": default.mini_batch_size,
            "ppo_epochs": default.ppo_epochs,
            "num_generations": 2,
        }
        chosen = replace(PPO, algorithm=algorithm, keep_every=2, **own)
    longer = replace(chosen, steps=7)
    rlsf(longer, **world, output=tmp_path / "whole")
    rlsf(chosen, **world, output=tmp_path / "grown")
    assert not (tmp_path / "grown" / ".work").exists()
    stream = io.StringIO()
    result = rlsf(longer, **world, output=tmp_path / "grown", progress=PipeProgress(stream))
    assert stream.getvalue() == ("4 steps become 7: the learning rates are those of a run of 7 steps from its start\n")
    same_output(tmp_path / "whole", tmp_path / "grown")
    assert (result["metrics"]["steps_before"], result["metrics"]["as_never_stopped"]) == ([4], True)
    for folder in (tmp_path / "whole").glob("policies/*"):
        kept = tmp_path / "grown" / "policies" / folder.name / "model.safetensors"
        assert kept.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert rlsf(longer, **world, output=tmp_path / "grown") == result
    with pytest.raises(StoreError, match="steps was 7, is 4"):
        rlsf(chosen, **world, output=tmp_path / "grown")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_more(world: dict[str, Any], tmp_path: Path) -> None:
    rlsf(replace(PPO, steps=5), **world, output=tmp_path / "whole")
    with pytest.raises(Stopped):
        rlsf(PPO, **world, output=tmp_path / "killed", progress=StopAfter(4))
    rlsf(replace(PPO, steps=5), **world, output=tmp_path / "killed")
    same_output(tmp_path / "whole", tmp_path / "killed")


def test_another_schedule_is_told(world: dict[str, Any], tmp_path: Path) -> None:
    cosine = replace(PPO, steps=1, schedule="cosine")
    rlsf(cosine, **world, output=tmp_path)
    stream = io.StringIO()
    result = rlsf(replace(cosine, steps=2), **world, output=tmp_path, progress=PipeProgress(stream))
    assert "the result is not that of one run of 2 steps" in stream.getvalue()
    assert result["metrics"]["as_never_stopped"] is False


def test_which_rates_are_the_same() -> None:
    assert as_never_stopped(replace(PPO, steps=8), [4])
    # 4 steps are 16 updates: a tenth is 2 updates of warm-up, and 4 of a run of 8 steps
    assert not as_never_stopped(replace(PPO, steps=8, warmup_ratio=0.1), [4])
    assert as_never_stopped(replace(PPO, steps=5, warmup_ratio=0.1), [4])  # 20 updates: 2 of warm-up too
    assert not as_never_stopped(replace(PPO, steps=8, schedule="linear"), [4])
    assert not as_never_stopped(replace(PPO, steps=6, warmup_ratio=0.1), [2, 5])


def test_without_its_state_or_after_a_guard_it_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    one = replace(PPO, steps=1, keep_state=False)
    rlsf(one, **world, output=tmp_path / "bare")
    assert not (tmp_path / "bare" / STATE).exists()
    with pytest.raises(StoreError, match=r"steps was 1, is 2\): it is done, and kept no state/ to go on from; choose"):
        rlsf(replace(one, steps=2), **world, output=tmp_path / "bare")
    wild = replace(PPO, kl_limit=0.01, learning_rate=1e-2, kl_coefficient=0.0)
    assert rlsf(wild, **world, output=tmp_path / "guard")["metrics"]["stopped"] == "kl"
    assert not (tmp_path / "guard" / STATE).exists()
    with pytest.raises(StoreError, match=r"steps was 4, is 5\): a guard stopped it \(kl\)"):
        rlsf(replace(wild, steps=5), **world, output=tmp_path / "guard")


@pytest.mark.parametrize("at", ["result", "state", "spec"])
def test_a_kill_while_a_stage_begins_to_grow(at: str, tmp_path: Path) -> None:
    """Whatever was done of it, the stage has its checkpoint and takes the new number."""
    folder = tmp_path / "s"

    def opened(steps: int) -> Stage:
        return Stage(folder, "rlsf", RLSFSettings(steps=steps), grows=("steps",))

    with opened(4) as stage:
        (folder / ".work" / "step-000004").mkdir(parents=True)
        (folder / ".work" / "step-000002").mkdir()
        stage.finish({"stopped": None}, {}, folder / ".work" / "step-000004")
    assert [file.name for file in (folder / STATE).iterdir()] == ["step-000004"]
    before = shutil.copytree(folder, tmp_path / "before")
    with opened(8) as stage:
        assert (stage.result, stage.grown) == (None, {"steps": [4]})
        assert (folder / ".work" / "step-000004").is_dir()
    # The same, with what a kill would have left: the steps are result, state, spec.
    shutil.rmtree(folder)
    shutil.copytree(before, folder)
    (folder / "result.json").unlink()
    if at != "result":
        (folder / STATE).rename(folder / ".work")
    if at == "spec":
        spec = read_json(folder / "stage.json")
        spec["settings"]["steps"] = 8
        (folder / "stage.json").write_text(json.dumps({**spec, "grown": {"steps": [4]}}))
    with opened(8) as stage:
        assert (stage.result, stage.grown) == (None, {"steps": [4]})
        assert (folder / ".work" / "step-000004").is_dir()
