"""The tests see nothing of what the user has set or cached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import own_environment

from almost_eval.models.endpoints import KEYS

USERS = {
    "HF_HOME": "/users/cache",
    "HF_DATASETS_CACHE": "/users/datasets",
    "HF_HUB_CACHE": "/users/hub",
    "HUGGINGFACE_HUB_CACHE": "/users/hub",
    "HF_HUB_OFFLINE": "0",
    "HF_TOKEN": "hf_secret",
    "ALMOST_CACHE": "/users/almost",
    "ALMOST_API_KEY": "secret",
    "OPENAI_API_KEY": "secret",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
    "WANDB_API_KEY": "secret",
    "https_proxy": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "GIT_DIR": "/users/other/.git",
    "COLUMNS": "40",
    "ALMOST_DATA_ROOT": "hub",
    "ALMOST_REAL_MODELS": "/users/models",
}


def test_what_the_user_has_set_reaches_no_test(tmp_path: Path) -> None:
    code = "import own_environment, os, json; print(json.dumps([dict(os.environ), str(own_environment.DATA_ROOT)]))"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(own_environment.__file__).parent), **USERS}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    left, data_root = json.loads(done.stdout)
    assert data_root == str(tmp_path / "hub")  # for the fixtures that look for the real data, and for nothing else
    assert "ALMOST_DATA_ROOT" not in left
    assert left["ALMOST_REAL_MODELS"] == "/users/models"
    assert left["HF_HUB_OFFLINE"] == "1"
    own = {name: left[name] for name in ("HF_HOME", "ALMOST_CACHE")}
    assert not any(value.startswith("/users") for value in own.values())
    kept = {"ALMOST_REAL_MODELS", "HF_HUB_OFFLINE", *own}
    assert not left.keys() & (USERS.keys() - kept)
    assert not any(Path(value).exists() for value in own.values())  # removed with the process


def test_this_process_has_its_own_caches() -> None:
    """Libraries read the environment once, as they are imported: it was the tests' own by then."""
    import datasets.config
    from huggingface_hub import constants

    home = Path(os.environ["HF_HOME"])
    assert "almost-tests-" in home.parent.name
    for place in (constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE):
        assert Path(place).is_relative_to(home)
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    assert not any(os.environ.get(name) for name in KEYS)
