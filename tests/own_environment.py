"""The environment of the tests: nothing that the user of this machine has set, or has in a cache, reaches a test.

Imported first by conftest.py, before anything reads the environment; processes that tests start inherit it. Without it
a cache of Hugging Face that holds the real TruthfulQA makes a test fail, and the user's key goes to a test's server.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

FOREIGN = (
    *("ALMOST_", "OPENAI_", "AZURE_OPENAI_", "ANTHROPIC_", "WANDB_", "VLLM_API_KEY", "GRADIO_", "GIT_"),
    *("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "PYTORCH_TRANSFORMERS_", "DATASETS_", "LMEVAL_"),
    *("ACCELERATE_", "FSDP_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_"),
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "TTY_"),
)
"""Beginnings of names that a test does not inherit: of those that this toolkit or a library of it reads."""

PLACES = ("ALMOST_REAL_MODELS", "ALMOST_CHROMIUM", "ALMOST_SCREENSHOTS", "ALMOST_TESTS_DATA_ROOT")
"""Names that only fixtures read: where something is on this machine."""

MADE = "ALMOST_TESTS_ENVIRONMENT"
"""The variable that says who made the environment: a worker of pytest-xdist has caches of its own."""
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")


def clean() -> None:
    """Make this process's environment the tests' own."""
    if root := os.environ.get("ALMOST_DATA_ROOT"):  # for the fixture `data_root` alone: commands must not see it
        os.environ["ALMOST_TESTS_DATA_ROOT"] = os.path.abspath(root)
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or (name.startswith(FOREIGN) and name not in PLACES):
            del os.environ[name]
    caches = tempfile.mkdtemp(prefix="almost-tests-")
    atexit.register(shutil.rmtree, caches, ignore_errors=True)
    os.environ |= {"HF_HOME": f"{caches}/huggingface", "HF_HUB_OFFLINE": "1", "ALMOST_CACHE": f"{caches}/almost"}
    os.environ[MADE] = WORKER


if os.environ.get(MADE) != WORKER:  # a process that a test spawns inherits what was made
    clean()

DATA_ROOT = Path(
    os.environ.get("ALMOST_TESTS_DATA_ROOT") or Path(__file__).resolve().parents[2] / "shared" / "data" / "hub"
)
"""The real data sets, laid out like the hub: ALMOST_DATA_ROOT of the user's, or beside the checkout. May not exist."""
