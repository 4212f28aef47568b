"""Who may import whom, and what may load before anything is asked for."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("almost_eval", "almost_train", "serving") for p in (ROOT / package).rglob("*.py"))

HEAVY = {
    "torch": {
        "almost_eval/engines/hf_attention.py",
        "almost_eval/engines/hf_generation.py",
        "almost_eval/engines/hf_loglikelihood.py",
        "almost_train/rlsf/ppo.py",
        "almost_train/rlsf/checkpoint.py",
        "almost_train/rlsf/models.py",
        "almost_train/rlsf/loop.py",
        "almost_train/rlsf/trl.py",
        "almost_train/rlsf/rollouts.py",
    },
    "transformers": {
        "almost_eval/engines/hf_generation.py",
        "almost_train/rlsf/models.py",
        "almost_train/rlsf/trl.py",
        "almost_train/rlsf/rollouts.py",
    },
    "vllm": set(),
    "lm_eval": set(),
    "datasets": set(),
    "gradio": {f"serving/chat/{name}.py" for name in ("app", "tab_arena", "tab_chat", "tab_compare", "tab_report", "widgets")},
    "matplotlib": set(),
    "trl": set(),
    "scipy": set(),
    "sklearn": set(),
    "openai": set(),
    "tensorboard": set(),
    "wandb": set(),
}
"""Package -> the files that import it at module level: those that cannot be used without it, each imported late."""

LIGHT = {"almost_eval", "click"}
"""What `almost-eval --help` may load besides the standard library and the interpreter's own start-up."""

START_UP = {"__main__", "_distutils_hack", "sitecustomize", "usercustomize"}
"""Loaded by `site`, whatever runs; `__editable__...` finders of editable installs too."""


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


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


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

    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) <= 0.5
