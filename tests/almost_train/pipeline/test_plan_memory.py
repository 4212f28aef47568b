"""A plan against the truth: a training of each stage in a process of its own, whose peak memory the system counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")]

TOLERANCE = 0.15
LENGTH = 128
STAGES = (
    *("sft", "reward", "rlsf", "rlsf-lora", "rlsf-rloo", "rlsf-rloo-lora"),
    *("dpo", "dpo-lora", "online_dpo", "online_dpo-lora", "responses"),
)
"""Each a section of a recipe, some with the settings of a variant."""
TRAINING: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "max_length": LENGTH, "device": "cpu"}
RLSF: dict[str, Any] = {
    "steps": 2,
    "batch_size": 4,
    "mini_batch_size": 4,
    "micro_batch_size": 2,
    "sampling_batch_size": 4,
    "ppo_epochs": 1,
    "max_new_tokens": 16,
    "keep_state": False,
    "device": "cpu",
}
OF_PPO = ("mini_batch_size", "sampling_batch_size", "ppo_epochs")
RLOO = {key: value for key, value in RLSF.items() if key not in OF_PPO} | {"algorithm": "rloo", "num_generations": 2}
ONLINE = {**TRAINING, "max_length": 144, "max_new_tokens": 16, "sampling_batch_size": 4, "eos_penalty": 0.0}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "almost_train.cli", *arguments]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[3])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}


WAIT = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(*arguments: str) -> int:
    """Bytes of the largest resident set of a command, which must end well.

    A small process starts it: Linux counts among a program's resident set that of the process which started it, and
    this one may hold real models of other tests.
    """
    started = [sys.executable, "-c", WAIT, *command(*arguments)]
    done = subprocess.run(started, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout) * 1024


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def section(stage: str) -> dict[str, Any]:
    """Its settings."""
    name, _, variant = stage.partition("-")
    own = {"rlsf": RLOO if "rloo" in variant else RLSF, "online_dpo": ONLINE}.get(name, TRAINING)
    return {**own, **({"lora_rank": 8} if "lora" in variant else {})}


@cache
def plans(model: str, variant: str) -> list[dict[str, Any]]:
    """The rows of a plan for all stages of one model."""
    after_sft = [stage for stage in ("rlsf", "dpo", "online_dpo") if not variant or f"{stage}-{variant}" in STAGES]
    recipe = {
        "prompt_set": "builtin",
        "engine": {"dtype": "float32"},
        "prompts": {"model": model, "count": 8},
        "responses": {
            "max_new_tokens": 24,
            "configurations": [
                {"name": name, "model": model, "demonstrations": "HHH", "shots": 1} for name in ("one", "two")
            ],
        },
        "comparisons": {"ranking": ["one", "two"]},
        "reward": {"model": model, **TRAINING},
        "sft": {"model": model, **TRAINING},
        **{stage: section(f"{stage}-{variant}") for stage in after_sft},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        done = subprocess.run(
            command("plan", str(file), "--json"), env=environment(), capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    stages: list[dict[str, Any]] = json.loads(done.stdout)["stages"]
    return stages


def planned(model: str, stage: str) -> dict[str, Any]:
    name, _, variant = stage.partition("-")
    return next(row for row in plans(model, variant) if row["stage"] == name)


def text_of(model: str, tokens: int) -> str:
    """Plain text of about so many tokens of the model."""
    tokenizer = load_tokenizer(find_checkpoint(model, architectures=("",)))
    words = "the otter lives by the river and eats fish in the morning while it rains on the old stone bridge".split()
    text = ""
    for number in range(tokens):
        longer = f"{text} {words[number % len(words)]}"
        if len(tokenizer.encode(longer, add_special_tokens=False)) > tokens:
            return text.strip()
        text = longer
    return text.strip()


def rows(file: Path, values: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(file)


def measured(model: str, folder: Path, stage: str) -> int:
    """The peak of a small run, whose texts are nearly as long as the plan takes them to be."""
    output = ["--output", str(folder / stage)]
    long = text_of(model, LENGTH - 56)  # beside it the template, with a system message of its own
    if stage == "sft":
        talks = [
            {"messages": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": f"{long} {i}"}]}
            for i in range(8)
        ]
        file = rows(folder / "demonstrations.jsonl", talks)
        return peak("sft", "--demonstrations", file, "--model", model, *flags(TRAINING), *output)
    if stage == "reward" or stage.startswith("dpo"):
        pairs = [{"prompt": f"Tell me {i}.", "chosen": f"{long} {i}", "rejected": f"{long} {i + 1}"} for i in range(10)]
        file = rows(folder / "comparisons.jsonl", pairs)
        kind, starts = ("reward", "--model") if stage == "reward" else ("dpo", "--policy")
        return peak(kind, "--comparisons", file, starts, model, *flags(section(stage)), *output)
    # With its template it is to leave room for an answer.
    short = text_of(model, 84 if stage.startswith("online_dpo") else 100)
    prompts = [{"id": f"p{i}", "prompt": f"{i} {short}"} for i in range(8)]
    file = rows(folder / "prompts.jsonl", prompts)
    if stage == "responses":
        configurations = folder / "configurations.yaml"
        one = {"name": "one", "model": model, "demonstrations": "HHH", "shots": 1}
        configurations.write_text(yaml.safe_dump([one]), encoding="utf-8")
        return peak(
            *("synthesize", "responses", "--prompts", file, "--configurations", str(configurations)),
            *("--prompt-set", "builtin", "--max-new-tokens", "24", "--dtype", "float32", "--device", "cpu", *output),
        )
    judge = folder / "judge"
    _judge(model, judge)
    command_of = stage.partition("-")[0].replace("_", "-")
    inputs = ("--policy", model, "--reward-model", str(judge), "--prompts", file)
    return peak(command_of, *inputs, *flags(section(stage)), *output)


def _judge(model: str, folder: Path) -> None:
    """A reward model of the model's size, with a head at random."""
    from almost_train.reward.run import RewardSettings, load_classifier, set_pad_token

    checkpoint = find_checkpoint(model, architectures=("",))
    tokenizer = load_tokenizer(checkpoint)
    set_pad_token(tokenizer)
    whole = load_classifier(checkpoint, RewardSettings())
    whole.config.pad_token_id = whole.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(model: str, folder: Path, stage: str) -> None:
    plan, truth = planned(model, stage), measured(model, folder, stage)
    print(f"{stage} {model}: planned {plan['total'] / 1e6:.0f} MB, measured {truth / 1e6:.0f} MB")
    assert abs(plan["total"] - truth) <= TOLERANCE * truth, (plan, truth)


@pytest.mark.parametrize("stage", STAGES)
def test_nano(stage: str, tmp_path: Path) -> None:
    compare("nano/vanilla-medium" if stage in ("sft", "reward", "responses") else "nano/sft", tmp_path, stage)


@pytest.mark.real
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_real_models(name: str, stage: str, real_models: Any, tmp_path: Path) -> None:
    compare(str(getattr(real_models, name)), tmp_path, stage)
