"""Two processes train as one: offline and online DPO, with the measurements on held-out pairs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import almost_train
from almost_eval.files import read_rows
from almost_train.nano.data import write_prompts, write_votes

CONFIGS = Path(almost_train.__file__).parent / "accelerate"

SCRIPT = """
import sys
from pathlib import Path
from almost_train.dpo.online import OnlineDPOSettings, train_online_dpo
from almost_train.dpo.run import DPOSettings, train_dpo

data, output, micro = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
same = dict(batch_size=8, micro_batch_size=micro, learning_rate=1e-3, device="cpu", max_steps=3)
offline = DPOSettings(**same, max_length=128, eval_every=2, eval_share=0.2)
train_dpo(offline, data / "votes.jsonl", "nano/sft", output / "dpo")
online = OnlineDPOSettings(**same, max_new_tokens=16, temperature=1.3, samples_every=1)
train_online_dpo(online, data / "prompts.jsonl", "nano/sft", "nano/reward", output / "online")
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    write_votes(tmp_path / "votes.jsonl", 25, wrong=0.0, seed=1)  # 20 to learn: the third batch holds four
    write_prompts(tmp_path / "prompts.jsonl", 20, pool="train", seed=1)
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--main_process_port", "0"]
    launch += ["--config_file", str(CONFIGS / "ddp_cpu.yaml")]
    for command, folder, micro in (([sys.executable], "one", 8), (launch, "two", 4)):
        arguments = [str(tmp_path / "train.py"), str(tmp_path), str(tmp_path / folder), str(micro)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("dpo", "online"):
        one, two = (read_rows(tmp_path / folder / stage / "log.jsonl") for folder in ("one", "two"))
        assert len(one) == len(two) == 3
        for left, right in zip(one, two, strict=True):
            assert left.keys() == right.keys()
            for key in left.keys() - {"tokens_per_second"}:
                assert right[key] == pytest.approx(left[key], abs=1e-4, rel=1e-3), (stage, left["step"], key)
    samples = [(tmp_path / folder / "online" / "samples.jsonl") for folder in ("one", "two")]
    assert [row["chosen"] for row in read_rows(samples[0])] == [row["chosen"] for row in read_rows(samples[1])]
