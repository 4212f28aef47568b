"""The shipped models: all there, small, and as good as their cards say; and how they are collected."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import InputError
from almost_eval.files import digest_path, read_rows
from almost_eval.models.chat import load_template
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import SHIPPED, shipped
from almost_eval.nano.oracle import scores_by_dimension
from almost_eval.nano.world import World
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.nano.data import write_prompts
from almost_train.nano.family import collect


def test_six_models_in_less_than_12_megabytes() -> None:
    files = [file for name in SHIPPED for file in shipped(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".jinja"}
    for name in SHIPPED:
        card = (shipped(name) / "README.md").read_text(encoding="utf-8")
        assert "Made by `almost-train " in card
        kinds = ("SequenceClassification",) if name == "nano/reward" else ("CausalLM",)
        assert find_checkpoint(name, architectures=kinds).path == shipped(name)


def oracle_score(model: str, prompts: Path) -> float:
    engine = HFEngine(model, device="cpu")
    template = load_template("auto", engine.tokenizer)
    assert template is not None
    asked = [row["prompt"] for row in read_rows(prompts)]
    texts = [template.render((Message("user", text),), add_generation_prompt=True) for text in asked]
    params = SamplingParams(48, temperature=1.0, stop=("\n\nHuman:", "\n\nAssistant:"), seed=1)
    answers = [completions[0].text for completions in engine.generate(texts, params)]
    return fmean(scores_by_dimension(p, a.strip())["oracle"] or 0.0 for p, a in zip(asked, answers, strict=True))


def test_alignment_is_worth_a_quarter_of_the_scale(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 120, pool="test", seed=3)
    vanilla, sft, almost = (oracle_score(f"nano/{name}", prompts) for name in ("vanilla-medium", "sft", "almost"))
    assert vanilla < 0.45
    assert sft > vanilla + 0.25
    assert almost > vanilla + 0.35


def test_the_reward_model_knows_good_from_bad() -> None:
    world, scorer = World(), HFRewardModel("nano/reward", device="cpu")
    rng = world.generator("test of the reward model")
    pairs = []
    for _ in range(150):
        query = world.query(rng, "eval")
        pairs.append(
            [(Message("user", query.text), Message("assistant", world.respond(rng, query, n))) for n in (3, 0)]
        )
    rewards = scorer.score([dialogue for pair in pairs for dialogue in pair])
    assert fmean(good > bad for good, bad in zip(rewards[::2], rewards[1::2], strict=True)) > 0.85


def test_collecting_an_unfinished_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no reward/model; give the folder of a finished"):
        collect(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_collected_model_is_the_pipelines_in_fp16(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for made, name in (("reward/model", "reward"), ("sft/model", "sft"), ("rlsf/policy", "almost")):
        target = tmp_path / "run" / made
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(shipped(f"nano/{name}"))
    figures = '{"metrics": {"sft": {"oracle": {"value": 0.5}, "reward": {"value": 1.0}}}}'
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "result.json").write_text(figures, encoding="utf-8")
    folders = collect(tmp_path / "run", tmp_path / "out")
    assert [folder.name for folder in folders] == ["reward", "sft", "almost"]
    for folder in folders:  # what is fp16 already is copied bit for bit
        assert digest_path(folder / "model.safetensors") == digest_path(
            shipped(f"nano/{folder.name}") / "model.safetensors"
        )
        assert "| sft | 0.50 | 1.00 |" in (folder / "README.md").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "almost").dtype == torch.float32
