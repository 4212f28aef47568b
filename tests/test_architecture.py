"""Who may import whom, and what may load before anything is asked for."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from machine_time import seconds_taken

from almost_eval.tasks.registry import TASKS

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("almost_eval", "almost_train", "serving") for p in (ROOT / package).rglob("*.py"))

HEAVY = {
    "torch": {
        "almost_eval/engines/hf_attention.py",
        "almost_eval/engines/hf_decoding.py",
        "almost_eval/engines/hf_float32.py",
        "almost_eval/engines/hf_generation.py",
        "almost_eval/engines/hf_header.py",
        "almost_eval/engines/hf_rows.py",
        "almost_eval/engines/hf_sampling.py",
        "almost_eval/engines/hf_loglikelihood.py",
        "almost_eval/engines/hf_rounding.py",
        "almost_eval/engines/hf_probe.py",
        "almost_eval/engines/vllm_sampling.py",
        "almost_train/pipeline/meter.py",
        "almost_train/rlsf/ppo.py",
        "almost_train/rlsf/checkpoint.py",
        "almost_train/rlsf/models.py",
        "almost_train/rlsf/sharding.py",
        "almost_train/rlsf/trl_trainer.py",
        "almost_train/rlsf/ppo_batch.py",
        "almost_train/rlsf/ppo_models.py",
        "almost_train/rlsf/ppo_update.py",
        "almost_train/rlsf/rollouts.py",
        "almost_train/rlsf/certificate.py",
        "almost_train/rlsf/header_sampling.py",
        "almost_train/rlsf/trl_sampling.py",
        "almost_train/rlsf/weight_transfer.py",
        "almost_eval/engines/vllm_weights.py",
    },
    "transformers": {
        "almost_eval/engines/hf_generation.py",
        "almost_eval/engines/hf_rows.py",
        "almost_eval/engines/hf_sampling.py",
        "almost_train/rlsf/models.py",
        "almost_train/rlsf/trl_trainer.py",
        "almost_train/rlsf/trl_watch.py",
        "almost_train/rlsf/rollouts.py",
    },
    "vllm": {
        "almost_eval/engines/vllm_weights.py",
        "almost_eval/engines/vllm_worker.py",
        "almost_train/rlsf/weight_transfer.py",
    },
    "lm_eval": set(),
    "datasets": set(),
    "gradio": {
        f"serving/chat/{name}.py"
        for name in "app layout tab_arena tab_chat tab_compare tab_first tab_report widgets".split()
    },
    "matplotlib": set(),
    "trl": set(),
    "scipy": set(),
    "sklearn": set(),
    "openai": set(),
    "tensorboard": set(),
    "wandb": set(),
    "ray": set(),
}
"""Package -> the files that import it at module level: those that cannot be used without it, each imported late."""

LIGHT = {"almost_eval", "click"}
"""What `almost-eval --help` may load besides the standard library and the interpreter's own start-up."""

START_UP = {"__main__", "_distutils_hack", "sitecustomize", "usercustomize"}
"""Loaded by `site`, whatever runs; `__editable__...` finders of editable installs too."""


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def imported_anywhere(file: Path) -> set[str]:
    nodes = (node for node in ast.walk(tree(file)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {module.split(".")[0] for node in nodes for module in modules(node)}


def imported_on_load(body: list[ast.stmt]) -> Iterator[str]:
    """What importing the module imports: classes, conditions and `try` count, functions and type checking do not."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (module.split(".")[0] for module in modules(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported_on_load(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from imported_on_load(getattr(node, part, []))


def test_there_is_something_to_walk() -> None:
    assert {"almost_eval/cli/main.py", "almost_train/__init__.py", "serving/__init__.py"} <= set(map(relative, FILES))


@pytest.mark.parametrize(
    ("package", "barred"),
    [("almost_eval", {"almost_train", "serving"}), ("almost_train", {"serving"}), ("serving", {"almost_train"})],
)
def test_dependencies_point_one_way(package: str, barred: set[str]) -> None:
    found = {relative(f): imported_anywhere(f) & barred for f in FILES if relative(f).startswith(f"{package}/")}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_load_only_where_they_are_used(package: str) -> None:
    assert {relative(f) for f in FILES if package in imported_on_load(tree(f).body)} == HEAVY[package]


ROOMS = {
    "almost_eval": (
        *("types", "errors", "progress", "stats", "files", "nano", "models", "data", "workers", "engines", "rewards"),
        *("tasks", "run", "compare", "judge", "arena", "report", "suite", "api", "cli"),
    ),
    "almost_train": ("common", "synthetic", "reward", "self_play", "sft", "rlsf", "dpo", "nano", "pipeline", "cli"),
    "serving": ("door", "launch", "models", "vllm", "gateway", "local", "chat", "all", "cli"),
}
"""Rooms and files of a package, from the ground up: a file may use what stands before its own room, never after."""

MODULES = {relative(f).removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in FILES}


def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports anywhere: lazily, under a condition and for types alone too."""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names & MODULES.keys()


GRAPH = {module: imports(file) - {module} for module, file in MODULES.items()}


def room(module: str) -> str:
    """`almost_eval.tasks.hhh` -> `tasks`; empty for the package itself, whose `__init__` stands above all."""
    return [*module.split("."), ""][1]


def test_every_room_has_its_place_and_few_files_stand_in_a_root() -> None:
    for package, order in ROOMS.items():
        assert {room(module) for module in MODULES if module.startswith(f"{package}.")} == set(order)
        assert len(list((ROOT / package).glob("*.py"))) - 1 <= 6  # without __init__.py


def test_rooms_are_used_one_way() -> None:
    upward = [
        (module, used)
        for module, uses in GRAPH.items()
        for used in uses
        if (order := ROOMS[module.split(".")[0]]) and room(module) and room(used)
        if module.split(".")[0] == used.split(".")[0] and order.index(room(used)) > order.index(room(module))
    ]
    assert upward == []


def test_no_cycle_between_files() -> None:
    left = {module: set(uses) for module, uses in GRAPH.items()}
    while ready := {module for module, uses in left.items() if not uses & left.keys()}:
        for module in ready:
            del left[module]
    assert sorted(left) == []


def test_click_is_known_to_command_lines_alone() -> None:
    users = {relative(f) for f in FILES if "click" in imported_anywhere(f)}
    assert {file for file in users if file.split("/")[1] != "cli"} == set()
    shared = {m for m, uses in GRAPH.items() if room(m) != "cli" and any(room(used) == "cli" for used in uses)}
    assert shared == set()


def test_a_room_says_what_it_is_for() -> None:
    for folder in {file.parent for file in FILES}:
        text = ast.get_docstring(tree(folder / "__init__.py"))
        assert text, folder
        assert len(text.split()) >= 5, folder


def test_no_file_outside_tasks_names_a_task() -> None:
    named = []
    for file in FILES:
        if relative(file).startswith(("almost_eval/tasks/", "almost_eval/nano/")):
            continue  # nano writes data sets in the forms of the real ones
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree(file))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Constant) and node.value in TASKS and id(node) not in documentation:
                named.append((relative(file), node.lineno, node.value))
    assert named == []


def test_a_public_class_name_is_used_once() -> None:
    names: dict[str, list[str]] = {}
    for file in FILES:
        for node in tree(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(relative(file))
    assert {name: files for name, files in names.items() if len(files) > 1} == {}


@pytest.mark.parametrize("word", ["found", "given", "asked"])
def test_names_are_nouns(word: str) -> None:
    """Participles stood 9 to 17 times in 1,000 lines; other good code has fewer than 2."""
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    uses = sum(len(re.findall(rf"\b{word}\b", text)) for text in texts)
    assert 1000 * uses / sum(text.count("\n") for text in texts) < 4


def test_few_values_are_of_any_type() -> None:
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    uses = sum(len(re.findall(r"\bAny\b", text)) for text in texts)
    assert 1000 * uses / sum(text.count("\n") for text in texts) < 12


def test_no_relative_imports() -> None:
    nodes = [(f, n) for f in FILES for n in ast.walk(tree(f)) if isinstance(n, ast.ImportFrom) and n.level]
    assert nodes == []  # the walks above read absolute names


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_what_loads_for(argument: str) -> None:
    report = "import sys\nprint(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    code = (
        f"import atexit, sys\natexit.register(lambda: exec({report!r}))\nfrom almost_eval.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True)
    loaded = {m for m in done.stderr.split() if not m.startswith("__editable__")}
    assert loaded - sys.stdlib_module_names - START_UP == LIGHT
    assert "almost-eval" in done.stdout


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_answers_in_half_a_second(argument: str) -> None:
    command = [str(Path(sys.executable).with_name("almost-eval")), argument]
    assert min(seconds_taken(command, holds="almost-eval") for _ in range(3)) <= 0.5


def test_a_program_that_evaluates_loads_no_click_and_stays_as_it_was(tmp_path: Path) -> None:
    code = """
import gc, sys
sys.modules["click"] = None  # as where it is not installed: httpx, which transformers needs, loads it if it can
import torch, transformers  # which the program has of its own
from transformers import utils
before = (gc.isenabled(), gc.get_freeze_count(), {name: getattr(utils, name) for name in dir(utils)}, list(sys.argv))
bars = utils.logging.is_progress_bar_enabled()
import almost_eval
run = almost_eval.evaluate("nano/almost", "hhh", limit=1, output=sys.argv[1])
assert run.results["metrics"]
assert (gc.isenabled(), gc.get_freeze_count(), {name: getattr(utils, name) for name in before[2]}, sys.argv) == before
assert utils.logging.is_progress_bar_enabled() == bars
print(any(name.startswith("almost_eval.cli") for name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
