"""Flags in texts exist; that by which a doubtful model is accepted is named by the commands that have it alone."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shown_commands import contexts, options_of

from almost_eval.errors import ModelError
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.nano import shipped
from almost_train.cli.main import cli as train

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
CONSENTS = {"--allow-pickle", "--trust-remote-code", "--allow-unused-weights"}
LOADING = ("models", "engines", "rewards")
"""Rooms of `almost_eval` that all three packages load models with."""


def raised(folder: Path) -> Iterator[tuple[str, str]]:
    """(Place, flag) of each flag named in a `raise` under a folder."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        for flag in FLAG.findall(part.value):
                            yield f"{file.relative_to(ROOT)}:{node.lineno}", flag


PROGRAMS = {
    "almost_eval": ("almost-eval",),
    "almost_train": ("almost-train",),
    "serving": ("almost-serve", "almost-chat"),
}
OF_OTHERS: dict[str, dict[str, str]] = {
    "almost_eval/cli/slurm.py": dict.fromkeys(
        ("--array", "--dependency", "--gres", "--job-name", "--parsable", "--partition", "--time"), "sbatch's"
    ),
    "almost_eval/compare/tax/training.py": {"--save-every": "of almost-train, whose folder is looked at"},
    "almost_eval/report/plots.py": dict.fromkeys(("--rule", "--sans"), "variables of CSS"),
    "almost_eval/run/provenance.py": dict.fromkeys(
        ("--no-optional-locks", "--porcelain", "--untracked-files"), "git's"
    ),
    "almost_train/rlsf/vllm_sampler.py": dict.fromkeys(
        ("--logprobs-mode", "--weight-transfer-config"), "vLLM's, of the server that the message is about"
    ),
    "almost_eval/workers/ray.py": {"--head": "of `ray start`, which the message names"},
    "serving/all.py": {"--gpu-memory-utilization": "vLLM's, which is passed to it"},
    "serving/chat/small_model.py": {"--no-deps": "pip's"},
    "serving/chat/tab_report.py": {"--output": "of almost-eval, which the message names"},
    "serving/vllm/command.py": dict.fromkeys(
        (
            *("--lora-target-modules", "--middleware", "--lora-modules", "--kv-cache-memory-bytes", "--max-model-len"),
            *("--uds", "--config"),
        ),
        "vLLM's, all of which almost-serve passes on",
    ),
    "serving/vllm/launch.py": {"--max-model-len": "vLLM's, which almost-serve passes on"},
}
"""File -> flags in its texts that its own package's commands have not, each with whose it is."""


def texts(file: Path) -> Iterator[str]:
    """All string constants of a file but its docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


@pytest.mark.parametrize("package", PROGRAMS)
def test_every_flag_in_a_text_is_one_of_the_packages_commands(package: str) -> None:
    known = {"--help", "--no-"}.union(
        *(options_of(context) for name, context in contexts().items() if name.split()[0] in PROGRAMS[package])
    )
    named: dict[str, set[str]] = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        flags = {flag for text in texts(file) for flag in FLAG.findall(text)} - known
        if flags:
            named[file.relative_to(ROOT).as_posix()] = flags
    assert named == {file: set(flags) for file, flags in OF_OTHERS.items() if file.startswith(f"{package}/")}


def test_what_loads_models_names_no_flag_to_accept_them_with() -> None:
    """It cannot know which command it runs under: it says `consent=`, and the command line names the flag."""
    named = [(at, flag) for room in LOADING for at, flag in raised(ROOT / "almost_eval" / room) if flag in CONSENTS]
    assert named == []


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    shutil.copytree(shipped("nano/almost"), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


def test_the_command_with_the_flag_names_it_and_one_without_does_not(
    pickled: Path, tmp_path: Path, almost_eval: Callable[..., Any]
) -> None:
    done = almost_eval("hhh", "--model", pickled, "--data", "nano")
    assert done.code == 2
    assert "(--allow-pickle)" in done.err
    with pytest.raises(ModelError) as error:
        train.main(
            [
                "sft",
                "--model",
                str(pickled),
                "--demonstrations",
                str(_records(tmp_path)),
                "--output",
                str(tmp_path / "o"),
            ],
            standalone_mode=False,
        )
    assert "pickled weights" in str(error.value)
    assert "--" not in str(error.value)


def _records(folder: Path) -> Path:
    file = folder / "demonstrations.jsonl"
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}) + "\n"
    )
    return file


def test_code_of_its_own_is_refused_with_its_consent(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(shipped("nano/almost"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "none-of-these", "auto_map": {"AutoConfig": "own.C", "AutoTokenizer": ["own.T", None]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(ModelError, match="Python code that it ships") as error:
        load_tokenizer(find_checkpoint(str(folder)))
    assert error.value.consent == "trust_remote_code"
