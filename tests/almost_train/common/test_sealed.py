"""A checkpoint that was damaged after it was written is told, and not trained on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import RunError, StoreError
from almost_eval.files import digest_path, read_rows
from almost_eval.progress import Progress
from almost_train.common.sealed import SEAL, damage, seal, undamaged
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf

REWARD = RewardSettings(
    batch_size=4, epochs=3, max_length=64, learning_rate=1e-3, save_every=2, eval_share=0.2, eval_every=3, device="cpu"
)


class Killed(Exception):
    """In the place of a kill."""


class StopsAfter(Progress):
    """Ends a training after so many steps, as a kill does, and keeps what users are told."""

    def __init__(self, steps: int) -> None:
        self.left, self.told = steps, ""

    def notice(self, message: str) -> None:
        self.told += message

    @contextmanager
    def track(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        def advance(steps: int) -> None:
            self.left -= steps
            if self.left < 0:
                raise Killed

        yield advance


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def empty(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (Path.unlink, "a/weights is missing"),
        (cut, "a/weights has 100 bytes of 300000"),
        (empty, "a/weights is not what was written"),
    ],
)
def test_what_is_wrong_with_a_checkpoint(spoil: Callable[[Path], None], problem: str, tmp_path: Path) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "weights").write_bytes(b"w" * 300_000)
        (tmp_path / name / "empty").touch()
        seal(tmp_path / name)
        assert damage(tmp_path / name) is None
    one, two = tmp_path / "step-1", tmp_path / "step-2"
    spoil(two / "a" / "weights")
    assert damage(two) == problem
    told: list[str] = []
    assert undamaged([one, two], told.append) == [one]
    assert told == [f"the checkpoint {two} is damaged ({problem}): it is removed, and step-1 gone on from"]
    assert not two.exists()
    spoil(one / "a" / "weights")
    with pytest.raises(RunError, match=r"and there is no other; put the file back, or remove .* to begin anew"):
        undamaged([one], told.append)
    assert one.exists()


def test_a_seal_of_an_earlier_version_says_nothing_of_files(tmp_path: Path) -> None:
    (tmp_path / SEAL).touch()
    assert damage(tmp_path) is None


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from almost_eval.files import write_rows

    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    names = "otter panther owl fox bear wolf hare lynx cat dog".split()
    rows = [{"prompt": f"How big is the {n}?", "chosen": f"The {n} is big.", "rejected": "no idea"} for n in names]
    write_rows(file, rows)
    return file


@pytest.fixture(scope="module")
def whole(pairs: Path) -> Path:
    output = pairs.parent / "whole"
    train_reward(REWARD, pairs, "nano/vanilla-small", output)
    return output


@pytest.fixture
def killed(pairs: Path, tmp_path: Path) -> Path:
    with pytest.raises(Killed):
        train_reward(REWARD, pairs, "nano/vanilla-small", tmp_path / "killed", progress=StopsAfter(4))
    return tmp_path / "killed"


@pytest.mark.parametrize("spoil", [Path.unlink, cut])
def test_training_goes_on_from_the_checkpoint_before_to_the_same_bytes(
    spoil: Callable[[Path], None], pairs: Path, whole: Path, killed: Path
) -> None:
    last = max(killed.glob(".work/checkpoint-*"))
    spoil(last / "optimizer.pt")  # without it transformers went on, with moments of 0
    progress = StopsAfter(100)
    train_reward(REWARD, pairs, "nano/vanilla-small", killed, progress=progress)
    assert f"{last} is damaged (optimizer.pt" in progress.told
    assert digest_path(killed / "model") == digest_path(whole / "model")
    assert not (killed / "model" / SEAL).exists()


def test_a_log_or_best_model_that_is_gone_is_told(pairs: Path, killed: Path) -> None:
    log = (killed / "log.jsonl").read_bytes()
    (killed / "log.jsonl").unlink()
    with pytest.raises(RunError, match=r"log.jsonl has rows of 0 of the 4 steps that are done; put it back"):
        train_reward(REWARD, pairs, "nano/vanilla-small", killed)
    (killed / "log.jsonl").write_bytes(log)
    shutil.rmtree(killed / ".work" / "best-000003")
    with pytest.raises(RunError, match=r"best-000003, the best model so far, is damaged \(it is missing\)"):
        train_reward(REWARD, pairs, "nano/vanilla-small", killed)


def test_a_stage_that_is_done_without_its_model_is_told(pairs: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "done")
    (tmp_path / "done" / "eval.jsonl").unlink()  # no stage reads it
    assert train_reward(REWARD, pairs, "nano/vanilla-small", tmp_path / "done")["stage"] == "reward"
    shutil.rmtree(tmp_path / "done" / "model")
    with pytest.raises(StoreError, match=r"is done, and its model is not there; put it back, or remove .*result.json"):
        train_reward(REWARD, pairs, "nano/vanilla-small", tmp_path / "done")


@pytest.mark.parametrize(
    ("algorithm", "file"), [("ppo", "policy-optimizer.safetensors"), ("grpo", "optimizer.pt"), ("rloo", "scheduler.pt")]
)
def test_rlsf_goes_on_from_the_checkpoint_before(algorithm: str, file: str, pairs: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"mini_batch_size": 4} if algorithm == "ppo" else {}
    settings = RLSFSettings(
        algorithm=algorithm, steps=5, batch_size=4, max_new_tokens=8, learning_rate=1e-4, save_every=1, **own
    )

    def train(name: str, progress: Progress) -> Path:
        rlsf(settings, pairs, "nano/sft", "nano/reward", tmp_path / name, progress=progress)
        return tmp_path / name

    with pytest.raises(Killed):
        train("killed", StopsAfter(3))
    last = max(folder for folder in (tmp_path / "killed" / ".work").iterdir() if "-" in folder.name)
    cut(last / file)
    progress = StopsAfter(100)
    killed, whole = train("killed", progress), train("whole", Progress())
    assert f"{last} is damaged ({file} has 100 bytes" in progress.told
    assert digest_path(killed / "policy") == digest_path(whole / "policy")
    assert len(read_rows(killed / "log.jsonl")) == 6
