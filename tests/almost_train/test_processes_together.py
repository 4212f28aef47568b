"""Every stage and algorithm in two processes, with whole copies, FSDP2 and ZeRO-3 over gloo, against one process.

A failure here was silent once: without `--device cpu`, RLOO and GRPO trained in each process apart.

ZeRO-3 is skipped where DeepSpeed is not installed, which is not among the project's packages. To run it:
`pip install deepspeed` in an environment of your own, and this file with `-k deepspeed -m slow`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from almost_eval.files import digest_path, read_rows, write_rows
from almost_train.dpo.online import OnlineDPOSettings, train_online_dpo
from almost_train.dpo.run import DPOSettings, train_dpo
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.rlsf.job import RLSFSettings, load_algorithm
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft

CONFIGS = Path(__file__).parents[2] / "almost_train" / "accelerate"
SUPERVISED: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_length": 64,
    "epochs": 2,
}
RL: dict[str, Any] = {
    "batch_size": 8,
    "mini_batch_size": 4,
    "micro_batch_size": 2,
    "num_generations": 4,
    "max_new_tokens": 12,
    # Adam makes a step of a part of this of a gradient that is zero but for rounding.
    "learning_rate": 3e-4,
    "warmup_ratio": 0.0,
    "kl_coefficient": 0.02,
    "kl_limit": 1000.0,
    "guard_window": 0,
    "keep_every": 2,
    "save_every": 2,
    "seed": 1,
}
ALL = ("reward", "sft", "dpo", "ppo", "rloo", "grpo")
"""Online DPO samples from whole weights: it takes no sharding."""
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")

# Imports everything once and forks two processes, which is all that a launcher does: so it takes half the time.
FORKED = """
import json, os, sys, traceback
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from stages import run_stage

port, order = sys.argv[1], json.loads(sys.argv[2])
children = []
for rank in (0, 1):
    children.append(os.fork())
    if children[-1] == 0:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
        try:
            for name in order["stages"]:
                run_stage(name, order["world"], order["output"], order["steps"])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""

LAUNCHED = """
import json, os, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from stages import run_stage, without_shared_memory_operator

if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
    without_shared_memory_operator()

order = json.loads(sys.argv[1])
output, rank = Path(order["output"]), os.environ["RANK"]
output.mkdir(exist_ok=True)
(output / f"pid-{rank}").write_text(str(os.getpid()))
own, stage, stepped_on = torch.optim.AdamW.step, "", {}

def step(self, *arguments, **options):
    # How many numbers of a model this process steps on: all of them where it holds it whole.
    parameters = [p for group in self.param_groups for p in group["params"]]
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    stepped_on[stage] = max(stepped_on.get(stage, 0), local)
    return own(self, *arguments, **options)

torch.optim.AdamW.step = step
for stage in order["stages"]:
    run_stage(stage, order["world"], order["output"], order["steps"])
(output / f"stepped-on-{rank}.json").write_text(json.dumps(stepped_on))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: Any, tiny_checkpoint: Any) -> dict[str, str]:
    """Data whose last batch of an epoch is not full, and models of two kinds."""
    folder = tmp_path_factory.mktemp("together")
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    pairs = (
        {
            "prompt": [turn("user", f"what is {i}?")],
            "chosen": [turn("assistant", "The cat sat. " * (1 + i % 3))],
            "rejected": [turn("assistant", "a dog " * (1 + i % 2))],
        }
        for i in range(13)
    )
    write_rows(folder / "comparisons.jsonl", pairs)
    dialogues = ([turn("user", f"what is {i}?"), turn("assistant", "The cat. " * (1 + i % 4))] for i in range(11))
    write_rows(folder / "demonstrations.jsonl", ({"id": f"d{i}", "messages": d} for i, d in enumerate(dialogues)))
    texts = ["What is a cat?", "Hello", "Say something true, and then stop.", "1 2 3", "Where is Paris?", "a dog"]
    write_rows(folder / "prompts.jsonl", ({"id": f"p{i}", "prompt": text} for i, text in enumerate(texts)))
    models = {"gqa": str(tiny_checkpoint("llama-gqa")), "tied": str(tiny_checkpoint("llama-tied"))}
    (folder / "stages.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    settings = RewardSettings(**SUPERVISED, device="cpu")
    train_reward(settings, folder / "comparisons.jsonl", models["gqa"], folder / "judge")
    return {"folder": str(folder), **models, "reward": str(folder / "judge" / "model")}


def run_stage(name: str, world: dict[str, str], output: str, steps: int) -> None:
    """One stage, in one process or as one of two: `--device auto`, as users have it."""
    import torch

    torch.set_num_threads(1)
    data, folder = Path(world["folder"]), Path(output) / name
    if name == "reward":
        train_reward(RewardSettings(**SUPERVISED, save_every=1), data / "comparisons.jsonl", world["gqa"], folder)
    elif name == "sft":
        train_sft(SFTSettings(**SUPERVISED, save_every=1), data / "demonstrations.jsonl", world["tied"], folder)
    elif name == "dpo":
        train_dpo(DPOSettings(**SUPERVISED, save_every=1), data / "comparisons.jsonl", world["tied"], folder)
    elif name == "online":
        own = OnlineDPOSettings(**SUPERVISED | {"epochs": 1}, max_new_tokens=12, samples_every=1)
        train_online_dpo(own, data / "prompts.jsonl", world["tied"], world["reward"], folder)
    else:
        taken = {key: value for key, value in RL.items() if load_algorithm(name).takes(key)}
        settings = RLSFSettings(algorithm=name, steps=steps, **taken)
        rlsf(settings, data / "prompts.jsonl", world["tied"], world["reward"], folder)


def without_shared_memory_operator() -> None:
    """DeepSpeed's way between processes on one machine, in C++: a minute to compile, and gloo does the same."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # as an attribute that name is torch itself
    backend.build_shm_op = lambda: None


def environment(world: dict[str, str]) -> dict[str, str]:
    paths = (world["folder"], str(CONFIGS.parents[1]))
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(paths)}


def order(world: dict[str, str], output: Path, stages: tuple[str, ...], steps: int) -> str:
    return json.dumps({"stages": stages, "world": world, "output": str(output), "steps": steps})


def same(one: Path, two: Path, processes: int, sharding: str | None) -> None:
    """The same weights, losses and samples within 1e-5, and a result that says how they were made."""
    files = sorted(file.relative_to(one) for file in one.rglob("model.safetensors"))
    assert files == sorted(file.relative_to(two) for file in two.rglob("model.safetensors"))
    for file in files:
        mine, theirs = load_file(one / file), load_file(two / file)
        assert mine.keys() == theirs.keys()
        assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) < 1e-5, file
        whole(two / file.parent, mine)
    rows, others = read_rows(one / "log.jsonl"), read_rows(two / "log.jsonl")
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for key in row.keys() & {"step", "loss", "policy_loss", "value_loss", "reward", "length", "ended"}:
            assert other[key] == pytest.approx(row[key], abs=1e-5), (key, row["step"])
    if (one / "samples.jsonl").exists():
        columns = ("completion", "chosen", "rejected")
        samples = [read_rows(folder / "samples.jsonl") for folder in (one, two)]
        texts = [[row.get(column) for row in rows for column in columns] for rows in samples]
        assert any(texts[0])
        assert texts[0] == texts[1]
    metrics = json.loads((two / "result.json").read_text(encoding="utf-8"))["metrics"]
    assert (metrics["processes"], metrics["sharding"]) == (processes, sharding)
    assert not (two / ".work").exists()


def whole(folder: Path, expected: dict[str, Any]) -> None:
    """A checkpoint that transformers loads with every weight it needs and none besides; each is the expected one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = "SequenceClassification" in AutoConfig.from_pretrained(folder).architectures[0]
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    weights = model.state_dict()
    for name, tensor in expected.items():
        assert float((weights[name] - tensor).abs().max()) < 1e-5, (folder, name)


@pytest.fixture(scope="module")
def alone(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RLOO and GRPO in one process, two steps."""
    output = tmp_path_factory.mktemp("alone")
    for name in ("rloo", "grpo"):
        run_stage(name, world, str(output), 2)
    return output


def test_rloo_and_grpo_train_together(world: dict[str, str], alone: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", FORKED, str(port), order(world, tmp_path, ("rloo", "grpo"), 2)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(world), start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors[-3000:]
    for name in ("rloo", "grpo"):
        same(alone / name, tmp_path / name, 2, None)


# --- launched as users do it ---


def launch(config: str, world: dict[str, str], folder: Path, output: Path, stages: tuple[str, ...], steps: int) -> Any:
    script = folder / "launched.py"
    script.write_text(LAUNCHED, encoding="utf-8")
    if config == "deepspeed.yaml":  # for GPUs: the same on two CPU processes
        shipped = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))
        own = folder / config
        changes = {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
        own.write_text(yaml.safe_dump(shipped | changes), encoding="utf-8")
        config = str(own)  # an absolute path stays itself behind `/`
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*accelerate, "--config_file", str(CONFIGS / config), str(script), order(world, output, stages, steps)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(world))


@pytest.fixture(scope="module")
def one_process(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    for name in (*ALL, "online"):
        run_stage(name, world, str(output), 4)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sharding"),
    [
        ("ddp_cpu.yaml", None),
        ("fsdp_cpu.yaml", "fsdp"),
        pytest.param("deepspeed.yaml", "deepspeed", marks=NEEDS_DEEPSPEED),
    ],
)
def test_two_processes_are_one_in_every_stage(
    config: str, sharding: str | None, world: dict[str, str], one_process: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    stages = ALL if sharding else (*ALL, "online")
    process = launch(config, world, tmp_path, output, stages, 4)
    printed, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-3000:]
    assert printed == ""
    for name in stages:
        same(one_process / name, output / name, 2, sharding)
    for rank in (0, 1):
        stepped_on = json.loads((output / f"stepped-on-{rank}.json").read_text(encoding="utf-8"))
        assert set(stepped_on) == set(stages)
        for name, count in stepped_on.items():
            (file,) = (one_process / name).glob("[mp]o*/model.safetensors")  # of `model/` or `policy/`
            share = count / sum(tensor.numel() for tensor in load_file(file).values())
            assert share >= 1 if sharding is None else share < 0.6, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "stage"),
    [("ddp_cpu.yaml", "ppo"), ("ddp_cpu.yaml", "grpo"), ("fsdp_cpu.yaml", "ppo"), ("fsdp_cpu.yaml", "sft")],
)
def test_two_killed_processes_go_on_to_the_same_bytes(
    config: str, stage: str, world: dict[str, str], tmp_path: Path
) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert launch(config, world, tmp_path, unbroken, (stage,), 12).wait(timeout=300) == 0
    process = launch(config, world, tmp_path, killed, (stage,), 12)
    try:
        deadline = time.monotonic() + 200
        while not _is_saved(killed / stage / ".work") and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
    finally:
        for rank in (0, 1):
            os.kill(int((killed / f"pid-{rank}").read_text(encoding="utf-8")), signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (killed / stage / "result.json").exists()
    assert launch(config, world, tmp_path, killed, (stage,), 12).wait(timeout=300) == 0
    model = "model" if stage == "sft" else "policy"
    assert digest_path(killed / stage / model) == digest_path(unbroken / stage / model)
    times = ("seconds", "tokens_per_second")
    logs = [read_rows(folder / stage / "log.jsonl") for folder in (unbroken, killed)]
    logs = [[{key: value for key, value in row.items() if key not in times} for row in rows] for rows in logs]
    assert logs[0] == logs[1]


def _is_saved(work: Path) -> bool:
    names = ("step-*/numbers.json", "checkpoint-*/whole", "checkpoint-*/trainer_state.json")
    return any(list(work.glob(name)) for name in names)
