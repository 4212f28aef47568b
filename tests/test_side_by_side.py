"""`make test`: both parts run, and either of them can fail it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from side_by_side import scope_of

TESTS = """
import os, pytest

def test_beside():
    assert os.environ["FAILS"] != "beside"
    assert "PYTEST_XDIST_WORKER" in os.environ

@pytest.mark.alone("a clock")
def test_alone():
    assert os.environ["FAILS"] != "alone"
    assert "PYTEST_XDIST_WORKER" not in os.environ

@pytest.mark.slow
def test_left_out():
    assert False
"""


@pytest.mark.parametrize(("fails", "passed", "code"), [("nothing", 2, 0), ("beside", 1, 1), ("alone", 1, 1)])
def test_both_parts_count(tmp_path: Path, fails: str, passed: int, code: int) -> None:
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    options = "[tool.pytest.ini_options]\naddopts = \"-p xdist -m 'not slow'\"\nmarkers = ['slow', 'alone']\n"
    (tmp_path / "pyproject.toml").write_text(options, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("side_by_side.py")), "1"],
        cwd=tmp_path,
        env=environment | {"FAILS": fails, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert f"\n--- {passed} passed, {2 - passed} failed, 0 skipped or expected to fail in " in done.stdout
    assert f"\non 1 cores: {int(fails != 'beside')} passed, " in done.stdout
    assert f"\nalone: {int(fails != 'alone')} passed, " in done.stdout


def test_what_needs_a_real_vllm_is_in_one_process() -> None:
    folder = Path(__file__).parent / "serving"
    names = ("gateway/test_gateway.py", "gateway/test_gateway_best_of.py", "vllm/test_server.py")
    assert {scope_of(f"tests/serving/{name}::test_it[a::b]") for name in names} == {"vLLM"}
    scopes = [scope_of(file.relative_to(folder.parents[1]).as_posix()) for file in folder.rglob("test_*.py")]
    assert 5 < scopes.count("vLLM") < len(scopes) / 2
    assert scope_of("tests/test_docs.py::test_it") == "tests/test_docs.py"
