"""A LoRA of full rank does what training all weights does: on the nano world, by the oracle, on held-out prompts.

The world's models are 64 wide, so an adapter of rank 64 beside a layer can be any change of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from almost_eval.compare.tax.tasks import nano_oracle
from almost_train.nano.data import write_prompts
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies
from almost_train.pipeline.recipe import load_recipe
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf

SEED_RANGE = (0.807, 0.859)
"""Of PPO on all weights, three seeds, these 600 prompts' oracle score: benchmarks/LOG.md, 2026-11-21."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
def test_ppo_with_a_lora_of_full_rank_reaches_the_oracle_of_all_weights(tmp_path: Path) -> None:
    recipe = load_recipe("nano")
    own = recipe.settings("rlsf", RLSFSettings)
    # Chosen on the other half of the held-out prompts, of two.
    settings = replace(own, lora_rank=64, learning_rate=3e-4, keep_every=0, device="cpu")
    prompts = write_prompts(tmp_path / "train.jsonl", 560, pool="train", seed=0)
    result = rlsf(settings, prompts, "nano/sft", "nano/reward", tmp_path / "rlsf")
    assert result["metrics"]["stopped"] is None
    held_out = write_prompts(tmp_path / "test.jsonl", 600, pool="test", seed=0)
    measured = evaluate_policies(
        recipe.settings("evaluation", EvaluationSettings, "prompts", "vanilla", "nano_prompts"),
        held_out,
        {"SFT": "nano/sft", "all weights": "nano/almost", "LoRA": tmp_path / "rlsf" / "policy"},
        tmp_path / "evaluation",
        reward_model="nano/reward",
        reference="SFT",
        judge=nano_oracle(),
    )["metrics"]
    oracle = {policy: metrics["oracle"]["value"] for policy, metrics in measured.items()}
    print(oracle)
    assert SEED_RANGE[0] <= oracle["all weights"] <= SEED_RANGE[1]  # the same prompts, and the same oracle
    assert oracle["LoRA"] >= SEED_RANGE[0]
    assert oracle["LoRA"] > oracle["SFT"]
