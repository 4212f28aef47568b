"""A plan's rows of the stages that start from SFT's policy, by arithmetic that a reader can check."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModel

from almost_eval.errors import InputError
from almost_eval.nano import BUILT_IN
from almost_train.cli.main import cli
from almost_train.dpo.online import OnlineDPOSettings
from almost_train.dpo.run import DPOSettings
from almost_train.pipeline.budget import budgets, seconds, whole_cost
from almost_train.pipeline.hardware import Devices
from almost_train.pipeline.meter import count, measured, optimiser_size
from almost_train.pipeline.needs import PROMPT_TOKENS, Estimator, Need, row_tokens
from almost_train.pipeline.policy_needs import dpo_need, online_dpo_need, rlsf_need
from almost_train.pipeline.recipe import load_recipe
from almost_train.pipeline.sampling_needs import VLLM_SHARE
from almost_train.pipeline.scale import scaled
from almost_train.pipeline.shapes import load_config
from almost_train.rlsf.job import RLSFSettings, check_settings
from almost_train.sft.run import SFTSettings

GPU = Devices(1, 24 * 10**9, True)
POLICY, REWARD = "nano/sft", "nano/reward"


def test_full_dpo_holds_the_policy_twice_and_a_lora_once() -> None:
    assert POLICY in BUILT_IN
    estimator = Estimator(GPU)
    settings = DPOSettings(batch_size=8, micro_batch_size=4, max_length=64, eval_share=0.0)
    full = dpo_need(estimator, "dpo", POLICY, settings, 8)
    number = full.parameters
    assert full.gradients == full.optimiser // 2 == 4 * number
    assert 0 <= full.weights - 2 * 4 * number < 2000  # policy and reference, and their buffers
    lora = dpo_need(estimator, "dpo", POLICY, replace(settings, lora_rank=2), 8)
    assert 0 <= lora.weights - 4 * number - 4 * lora.trained < 2000
    assert lora.optimiser == 8 * lora.trained
    # A pair is two rows: the activations are those of SFT at twice the micro-batch, and what the reference reads.
    eight = SFTSettings(batch_size=8, micro_batch_size=8, max_length=64)
    one = estimator.sft("sft", POLICY, eight, 8).activations
    assert one <= full.activations < 1.3 * one
    # Policy: forward and backward, three passes; the reference: one more.
    assert (full.passes, full.trained_tokens) == (4, 2 * 8 * 64)


def test_online_dpo_holds_the_reward_model_too_and_samples() -> None:
    estimator = Estimator(GPU)
    settings = OnlineDPOSettings(batch_size=4, micro_batch_size=2, max_new_tokens=32, max_length=256)
    need = online_dpo_need(estimator, "online_dpo", POLICY, REWARD, settings, 8)
    alone = dpo_need(estimator, "dpo", POLICY, DPOSettings(batch_size=4, micro_batch_size=2, max_length=64), 8)
    assert need.weights > alone.weights + 4 * need.parameters // 2
    assert need.rows == 8  # two answers of each of four prompts
    assert need.generated_tokens == 2 * 8 * 32
    assert need.trained_tokens == need.measured_tokens == 2 * 8 * (PROMPT_TOKENS + 32)  # the judge reads them once
    two = online_dpo_need(Estimator(replace(GPU, count=2)), "online_dpo", POLICY, REWARD, settings, 8)
    assert two.weights == need.weights
    assert "not divided" in two.note


@pytest.mark.parametrize(
    ("changes", "trained", "held_out"),
    [
        ({}, 200, 0),  # 100 rows, twice
        ({"eval_share": 0.1}, 180, 10),  # 90 rows twice; 10 once, after the last step
        # 90 rows are 12 steps of 8, the last one not full: 24 in two epochs, measured after 10, 20 and the last.
        ({"eval_share": 0.1, "eval_every": 10}, 180, 30),
        ({"eval_share": 0.1, "eval_every": 12}, 180, 20),  # after 12 and 24, which is the last
        ({"eval_share": 0.1, "eval_every": 10, "max_steps": 5}, 40, 10),
    ],
)
def test_tokens_of_rows_by_hand(changes: dict[str, Any], trained: int, held_out: int) -> None:
    settings = DPOSettings(**{"batch_size": 8, "epochs": 2, "eval_share": 0.0} | changes)
    assert row_tokens(settings, 100, 3) == {"trained_tokens": 3 * trained, "measured_tokens": 3 * held_out}


def test_what_optimisers_keep_by_hand() -> None:
    with measured():
        model = torch.nn.Linear(100, 1000)  # 100,000 numbers and 1,000
        assert optimiser_size(model, optim="adamw_torch") == 8 * 101_000
        # Two bytes a number and two float32 for each of 391 blocks of 256; the bias is too small for it.
        assert optimiser_size(model, optim="adamw_8bit") == 2 * 100_000 + 8 * 391 + 8 * 1_000
        assert optimiser_size(model, optim="adafactor") == 4 * (1_000 + 100) + 4 * 1_000


def test_an_8_bit_optimiser_is_a_quarter() -> None:
    estimator = Estimator(GPU)
    plain = DPOSettings(batch_size=8, micro_batch_size=2, max_length=64)
    small = replace(plain, optim="paged_adamw_8bit")
    before, after = (dpo_need(estimator, "dpo", POLICY, settings, 8) for settings in (plain, small))
    assert after.optimiser < 0.4 * before.optimiser
    assert (after.weights, after.gradients) == (before.weights, before.gradients)


def test_vllm_beside_the_policy_takes_its_share() -> None:
    settings = RLSFSettings(algorithm="grpo", batch_size=8, max_new_tokens=32, sampler="vllm")
    here = rlsf_need(Estimator(GPU), "rlsf", POLICY, REWARD, replace(settings, sampler="transformers"))
    beside = rlsf_need(Estimator(GPU), "rlsf", POLICY, REWARD, settings)
    assert beside.total > here.total + int(VLLM_SHARE * GPU.memory) - here.cache - here.activations
    half = rlsf_need(Estimator(GPU), "rlsf", POLICY, REWARD, replace(settings, sampler_memory=0.5))
    assert beside.total - half.total == int(VLLM_SHARE * GPU.memory) - int(0.5 * GPU.memory)
    # Asleep it leaves that memory to gradients and activations.
    asleep = rlsf_need(
        Estimator(GPU), "rlsf", POLICY, REWARD, replace(settings, sampler_memory=0.5, sampler_sleep=True)
    )
    assert asleep.total == half.total - half.gradients - half.activations
    tiny = rlsf_need(Estimator(GPU), "rlsf", POLICY, REWARD, replace(settings, sampler_memory=0.01))
    assert "no room for one answer" in tiny.note
    server = rlsf_need(Estimator(GPU), "rlsf", POLICY, REWARD, replace(settings, sampler="vllm-server"))
    assert server.cache == 0
    assert "not planned here" in server.note


def test_measured_time_has_sampling_and_held_out_passes_by_hand() -> None:
    """As --measure says it: RLSF samples most of its time."""
    need = Need("rlsf", POLICY, trained=1, trained_tokens=100, measured_tokens=60, generated_tokens=40, passes=3)
    # 3 x 100 + 60 tokens of forward passes at 60 a second, and 40 sampled ones at 2 a second.
    assert seconds(need, Estimator(GPU), lambda _, trains: 60 if trains else 2) == 6 + 20
    assert seconds(need, Estimator(GPU), lambda _, trains: 60 if trains else None) is None
    assert seconds(replace(need, generated_tokens=0), Estimator(GPU), lambda _, trains: 60 if trains else None) == 6


RECIPE: dict[str, Any] = {
    "prompt_set": "nano",
    "prompts": {"model": "nano/vanilla-small", "count": 8},
    "responses": {
        "max_new_tokens": 24,
        "configurations": [
            {"name": name, "model": "nano/vanilla-small", "demonstrations": "good", "shots": 1} for name in ("a", "b")
        ],
    },
    "comparisons": {"ranking": ["a", "b"]},
    "reward": {"model": "nano/vanilla-small", "max_length": 64},
    "self_play": {"assistant_demonstrations": "good", "user_demonstrations": "good", "max_new_tokens": 24},
    "sft": {"model": "nano/vanilla-small", "max_length": 64},
    "rlsf": {"steps": 1, "max_new_tokens": 8},
    "dpo": {"max_length": 64, "optim": "adamw_8bit"},
    "online_dpo": {"max_length": 64, "max_new_tokens": 8},
    "evaluation": {"nano_prompts": 10, "max_new_tokens": 8},
}


def recipe_file(folder: Path, **changes: Any) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False), encoding="utf-8")
    return str(file)


def test_every_stage_with_a_model_has_a_row(tmp_path: Path) -> None:
    rows = list(budgets(load_recipe(recipe_file(tmp_path)), Estimator(GPU), None))
    stages = [row.need.stage for row in rows]
    assert set(stages) == RECIPE.keys() - {"prompt_set", "comparisons"}  # that one filters by rules here
    # Each of SFT's policy and the three that start from it answers ten prompts with eight tokens.
    assert rows[-1].need.generated_tokens == 4 * 10 * 8


def test_what_this_machine_lacks_is_no_fault_of_a_plan(tmp_path: Path) -> None:
    """A plan is made on a laptop, for a GPU."""
    settings = RLSFSettings(algorithm="grpo", sampler="vllm", sampler_sleep=True)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="need a GPU"):
            check_settings(settings)
    assert check_settings(settings, here=False)
    with pytest.raises(InputError, match="takes no --sampler-sleep"):  # that fails anywhere
        check_settings(replace(settings, sampler="transformers"), here=False)


def test_the_small_form_has_small_dpo_and_no_gpu(tmp_path: Path) -> None:
    rlsf = {"algorithm": "grpo", "sampler": "vllm", "sampler_sleep": True, "sampler_memory": 0.3, "parity_limit": 0.1}
    tiny = scaled(load_recipe(recipe_file(tmp_path, rlsf=rlsf)), "tiny", "nano/vanilla-small")
    settings = tiny.settings("rlsf", RLSFSettings)
    check_settings(settings)
    assert settings.sampler == "transformers"
    dpo, online = tiny.settings("dpo", DPOSettings), tiny.settings("online_dpo", OnlineDPOSettings)
    assert (dpo.optim, dpo.batch_size, dpo.max_steps) == ("adamw_torch", 4, 2)
    assert (online.batch_size, online.max_new_tokens, online.max_steps) == (4, 8, 2)


# --- what is not the policy's own update ---


def test_the_as_is_filter_has_a_row(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, comparisons={"ranking": ["a", "b"], "as_is_reward_model": "nano/reward"})
    (need,) = [
        row.need for row in budgets(load_recipe(recipe), Estimator(GPU), None) if row.need.stage == "comparisons"
    ]
    assert need.model == "nano/reward"
    with measured():
        parameters = count(AutoModel.from_config(load_config("nano/reward")))
    assert (need.parameters, need.weights) == (parameters, 4 * parameters)
    # 8 prompts with 2 answers each: a prompt of 128 tokens and an answer of 24, in the nano model's context.
    length = min(128 + 24, load_config("nano/reward").max_position_embeddings)
    assert need.measured_tokens == 8 * 2 * length
    assert need.generated_tokens == need.trained_tokens == 0


def test_a_filter_that_the_recipe_trains_has_its_bases_size(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, votes={"count": 4}, as_is_reward={"model": "nano/vanilla-small", "max_length": 64})
    rows = {row.need.stage: row.need for row in budgets(load_recipe(recipe), Estimator(GPU), None)}
    assert rows["comparisons"].model == rows["as_is_reward"].model == "nano/vanilla-small"


@pytest.mark.parametrize("bf16", [False, True])
def test_a_policy_that_is_divided_is_whole_while_it_samples(bf16: bool) -> None:
    # One completion of one token, and an adapter: the update is small, so sampling is the fullest moment.
    small = RLSFSettings(batch_size=4, mini_batch_size=4, micro_batch_size=1, max_new_tokens=1, bf16=bf16, lora_rank=1)
    full, none = (
        rlsf_need(Estimator(Devices(4, 24 * 10**9, True, kind)), "rlsf", "huggyllama/llama-7b", REWARD, small)
        for kind in ("full", "none")
    )
    # A quarter of the policy, the reward model whole, and the policy in the bytes that it computes in.
    assert full.weights - none.weights // 4 == pytest.approx(full.parameters * (2 if bf16 else 4), rel=0.01)
    assert full.gradients == 0


def test_what_a_cpu_saves_is_whole_in_its_memory() -> None:
    settings = SFTSettings(batch_size=4, micro_batch_size=1, max_length=8, lora_rank=1)
    cpu, gpu = (
        Estimator(Devices(8, 10**12, on_gpu)).sft("sft", "huggyllama/llama-7b", settings, 4) for on_gpu in (False, True)
    )
    assert cpu.activations + cpu.gradients >= 4 * cpu.parameters  # the base in float32, gathered to be saved
    assert gpu.activations < cpu.activations


def test_a_served_model_is_planned_elsewhere(tmp_path: Path) -> None:
    served: dict[str, Any] = {
        "engine": {"engine": "openai", "base_url": "http://127.0.0.1:9/v1"},
        "prompts": {"model": "big-one", "count": 8},
        "self_play": RECIPE["self_play"] | {"assistant_model": "big-one", "user_model": "big-one"},
    }
    recipe = load_recipe(recipe_file(tmp_path, **served))
    rows = list(budgets(recipe, Estimator(GPU), None, lambda need, trains: 100.0))
    first, play = rows[0], next(row for row in rows if row.need.stage == "self_play")
    assert first.need.elsewhere
    assert (first.need.weights, first.need.seconds, first.fits) == (0, None, True)
    assert first.need.note == "big-one is served elsewhere, and not planned here"
    assert play.need.weights == 4 * Estimator(GPU).count("nano/vanilla-small")  # the reward model is beside it
    assert next(row for row in rows if row.need.stage == "evaluation").need.elsewhere is False
    total = whole_cost(rows, 1)
    assert total.seconds == sum(row.need.seconds for row in rows if row.need.seconds)
    outcome = CliRunner().invoke(cli, ["plan", recipe_file(tmp_path, **served), "--gpu", "a100-80gb"])
    assert outcome.exit_code == 0, outcome.output
    assert "big-one is served elsewhere" in outcome.output


def test_measured_rates_of_a_whole_recipe(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, comparisons={"ranking": ["a", "b"], "as_is_reward_model": "nano/reward"})
    outcome = CliRunner().invoke(cli, ["plan", recipe, "--measure", "--json"])
    assert outcome.exit_code == 0, outcome.output
    content = json.loads(outcome.stdout)
    assert content["total"]["seconds"] > 0
    assert all(stage["seconds"] > 0 for stage in content["stages"])
    assert content["rates"] == "what was measured on this machine"
