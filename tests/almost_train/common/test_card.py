"""Model cards as the hub's own library reads them, and the upload, to a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from huggingface_hub import ModelCard

from almost_eval.errors import InputError
from almost_train.common.card import STAGES, card_head, write_cards
from almost_train.common.hub import open_repository
from almost_train.nano.data import write_votes

SECRET = "hf_not_to_be_seen_in_any_log"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def write(folder: Path, stage: str, inputs: dict[str, Path | str], metrics: dict[str, Any]) -> ModelCard:
    spec = {"stage": stage, "settings": {"learning_rate": 1e-5, "stop": ["\n\nHuman:", "a|b`c"]}, "inputs": {}}
    spec["inputs"] = dict.fromkeys(inputs, "0123456789abcdef01")
    write_cards({folder: True}, spec, inputs, metrics)
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_base_licence_data_and_figures(checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: llama3\nbase_model: org/of-the-base\n---\n\n# base\n")
    accuracy = {"value": 0.75, "stderr": 0.1, "ci95": [0.5, 0.9], "n": 12, "unscored": 0}
    metrics = {
        "train_pairs": 90,
        "eval": {"accuracy": accuracy, "longer_wins": {"value": None}, "calibration_error": 0.1},
    }
    card = write(checkpoint, "reward", {"comparisons": "org/data:config@train", "model": base}, metrics)
    data: Any = card.data
    assert (data.base_model, data.license) == ("org/of-the-base", "llama3")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.datasets == ["org/data"]
    figures = {result.metric_name: result.metric_value for result in data.eval_results}
    assert figures == {"accuracy on held-out pairs": 0.75, "calibration error": 0.1}
    assert {result.dataset_type for result in data.eval_results} == {"org/data:config@train"}
    assert "| `train_pairs` | `90` |" in card.text
    assert "| `eval/accuracy/ci95` | `0.5, 0.9` |" in card.text
    assert str(tmp_path) not in card.content


def test_a_model_of_the_hub_is_the_base_itself(checkpoint: Path) -> None:
    data: Any = write(checkpoint, "sft", {"demonstrations": Path("d.jsonl"), "model": "org/base"}, {"answers": 3}).data
    assert (data.base_model, data.license, data.datasets) == ("org/base", None, None)
    assert data.eval_results is None  # nothing was held out


def test_what_a_file_says_is_no_markdown(checkpoint: Path) -> None:
    card = write(checkpoint, "rlsf", {"policy": "nano/sft"}, {"note": "<b>[x](y)</b>\n| `z` |", "broken": float("nan")})
    assert "| `note` | `<b>[x](y)</b> \\| 'z' \\|` |" in card.text
    assert "| `stop` | `'\\n\\nHuman:', 'a\\|b'c'` |" in card.text
    assert "broken" not in card.text


def test_other_stages_and_folders_get_none(tmp_path: Path, checkpoint: Path) -> None:
    write_cards({checkpoint: True}, {"stage": "evaluation", "settings": {}, "inputs": {}}, {}, {})
    write_cards({tmp_path / "absent": True, tmp_path: True}, {"stage": "sft", "settings": {}, "inputs": {}}, {}, {})
    assert not list(tmp_path.rglob("README.md"))
    assert card_head(checkpoint) == {}
    assert {"reward", "sft", "rlsf", "dpo", "online_dpo"} == STAGES.keys()


# --- the upload ---


def dpo(tmp_path: Path, hub: FakeHub, token: str, *more: str) -> subprocess.CompletedProcess[str]:
    pairs = write_votes(tmp_path / "votes.jsonl", 12, wrong=0.0, seed=1)
    command = [
        *(sys.executable, "-m", "almost_train.cli", "dpo", "--comparisons", str(pairs), "--policy", "nano/sft"),
        *("--batch-size", "12", "--micro-batch-size", "12", "--max-length", "128", "--device", "cpu", "--json"),
        *("--output", str(tmp_path / "out"), "--push-to-hub", "me/policy", *more),
    ]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_a_checkpoint_is_pushed_whole_and_its_token_is_seen_nowhere(tmp_path: Path) -> None:
    with FakeHub(SECRET) as hub:
        # 1. A wrong token: refused before anything is trained.
        refused = dpo(tmp_path, hub, "hf_another_secret")
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: --push-to-hub me/policy: ")
        assert refused.stderr.count("\n") == 1
        assert "hf_another_secret" not in refused.stderr + refused.stdout
        assert not (tmp_path / "out").exists()
        assert not hub.files

        # 2. The right one.
        done = dpo(tmp_path, hub, SECRET)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["stage"] == "dpo"
        assert f"pushed: {hub.url}/me/policy/commit/" in done.stderr
        model = tmp_path / "out" / "model"
        assert hub.files == {f"me/policy/{file.name}": file.read_bytes() for file in model.iterdir()}
        assert {"me/policy/README.md", "me/policy/model.safetensors", "me/policy/tokenizer.json"} <= hub.files.keys()
        assert hub.made[-1]["visibility"] == "private"
        assert hub.tokens == {SECRET, "hf_another_secret"}
        everything = done.stdout.encode() + done.stderr.encode()
        everything += b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
        assert SECRET.encode() not in everything

        # 3. A stage that is done is pushed again, and not made again.
        hub.files.clear()
        assert dpo(tmp_path, hub, SECRET).returncode == 0
        assert "me/policy/model.safetensors" in hub.files


def test_without_token_or_name_nothing_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="needs a token of the hub that may write, in the environment: HF_TOKEN"):
        open_repository("me/policy")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in ("policy", "me/", "me/po licy", "../up", "a/b/c"):
        with pytest.raises(InputError, match="a repository is named org/name"):
            open_repository(name)
    with FakeHub("hf_other") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(InputError) as error:
            open_repository("me/policy")
        assert SECRET not in str(error.value)
