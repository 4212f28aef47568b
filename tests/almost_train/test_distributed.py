"""Two processes against one, and the configurations that `accelerate launch` is given."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from almost_eval.files import digest_path, read_rows, write_rows
from almost_train.common.batches import batch_plan

CONFIGS = Path(__file__).parents[2] / "almost_train" / "accelerate"

SCRIPT = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from almost_eval.progress import Progress
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.sft.run import SFTSettings, train_sft

class Killer(Progress):
    @contextmanager
    def track(self, description, total, done=0):
        steps = iter(range(done + 1, 10**6))
        yield lambda count=1: os.kill(os.getpid(), signal.SIGKILL) if next(steps) == 5 else None

data, output, micro, end = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
common = dict(learning_rate=1e-3, batch_size=8, micro_batch_size=micro, max_length=64, epochs=2, device="cpu")
base, progress = str(data / "base"), Killer() if end == "killed" else Progress()
one = train_reward(RewardSettings(**common, save_every=2), data / "comparisons.jsonl", base, output / "reward",
                   progress=progress)
two = train_sft(SFTSettings(**common), data / "demonstrations.jsonl", base, output / "sft")
assert one["stage"] == "reward" and two["stage"] == "sft"  # in every process
"""


def test_the_plan_holds_every_row_once_an_epoch_and_fills_the_last_batch() -> None:
    lengths = [5, 9, 2, 7, 7, 1, 8]
    plan = batch_plan(lengths, batch_size=3, epochs=2, seed=0)
    assert (plan.steps, len(plan.order)) == (6, 18)
    for epoch in (plan.order[:9], plan.order[9:]):
        assert sorted(row for row in epoch if row is not None) == list(range(7))
        assert epoch[7:] == (None, None)
    assert plan.order[:9] != plan.order[9:]
    for at in range(0, 18, 3):  # the mean over a batch is the mean over its rows, and the longest come first
        assert sum(plan.weights[at : at + 3]) == pytest.approx(3)
        here = [lengths[row] for row in plan.order[at : at + 3] if row is not None]
        assert here == sorted(here, reverse=True)
    assert plan == batch_plan(lengths, batch_size=3, epochs=2, seed=0)
    assert plan != batch_plan(lengths, batch_size=3, epochs=2, seed=1)


@pytest.mark.parametrize("name", ["ddp_cpu", "fsdp", "deepspeed"])
def test_accelerate_reads_the_configuration(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes > 1
    if name == "ddp_cpu":
        assert config.use_cpu


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_the_launcher_knows_every_setting(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    given = {**config.fsdp_config, **config.deepspeed_config}
    assert given
    assert [key for key in given if key not in known] == []


def test_the_sharding_plugin_takes_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp.yaml"), "script.py"])
    for name, value in prepare_multi_gpu_env(_validate_launch_command(arguments)[0]).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL" in str(plugin.state_dict_type)


@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one(tiny_checkpoint: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    # 1. Data whose last batch of an epoch is not full: 23 pairs of which 2 are held out, 19 answers.
    (tmp_path / "base").symlink_to(tiny_checkpoint("llama-gqa"))
    (tmp_path / "train.py").write_text(SCRIPT)
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    write_rows(
        tmp_path / "comparisons.jsonl",
        (
            {
                "prompt": [turn("user", f"what is {i}?")],
                "chosen": [turn("assistant", "The cat sat. " * (1 + i % 3))],
                "rejected": [turn("assistant", "a dog " * (1 + i % 2))],
            }
            for i in range(23)
        ),
    )
    write_rows(
        tmp_path / "demonstrations.jsonl",
        (
            {"id": f"d{i}", "messages": [turn("user", f"what is {i}?"), turn("assistant", "The cat. " * (1 + i % 4))]}
            for i in range(19)
        ),
    )

    # 2. One process with batches of 4, two with batches of 2; and two of which the main one is killed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--main_process_port", "0"]
    launch += ["--config_file", str(CONFIGS / "ddp_cpu.yaml")]

    def train(command: list[str], folder: str, micro: int, end: str = "whole") -> int:
        arguments = [str(tmp_path / "train.py"), str(tmp_path), str(tmp_path / folder), str(micro), end]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        assert done.stdout == ""
        assert done.returncode == 0 or end == "killed", done.stderr[-3000:]
        return done.returncode

    train([sys.executable], "one", 4)
    train(launch, "two", 2)
    assert train(launch, "again", 2, "killed") != 0
    assert not (tmp_path / "again" / "reward" / "model").exists()
    train(launch, "again", 2)

    # 3. The same path and the same end.
    for stage, steps in (("reward", 6), ("sft", 6)):
        one, two = (read_rows(tmp_path / folder / stage / "log.jsonl") for folder in ("one", "two"))
        assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, steps + 1))
        for left, right in zip(one, two, strict=True):
            for key in ("loss", "lr", "grad_norm"):
                assert right[key] == pytest.approx(left[key], abs=1e-4), (stage, left["step"], key)
        weights = [load_file(tmp_path / folder / stage / "model" / "model.safetensors") for folder in ("one", "two")]
        assert weights[0].keys() == weights[1].keys()
        assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-4
        assert not (tmp_path / "two" / stage / ".work").exists()
        assert digest_path(tmp_path / "again" / stage / "model") == digest_path(tmp_path / "two" / stage / "model")
