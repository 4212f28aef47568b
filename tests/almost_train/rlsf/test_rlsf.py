"""The whole stage on a tiny policy and a reward model made by hand, which likes some tokens."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopping import StopAfter, Stopped
from transformers import AutoTokenizer

from almost_eval.compare.tax.training import read_training
from almost_eval.errors import DataError, InputError, RunError, StoreError
from almost_eval.files import read_rows
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.common.config import settings_to_dict
from almost_train.rlsf.job import ALGORITHMS, COMMON_SETTINGS, RLSFSettings, check_settings, load_algorithm
from almost_train.rlsf.rollouts import conversation
from almost_train.rlsf.run import rlsf

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "batch_size": 16,
    "mini_batch_size": 8,
    "micro_batch_size": 8,
    "max_new_tokens": 12,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.0,
    "kl_coefficient": 0.02,
    "kl_controller": "fixed",
    "kl_limit": 1000.0,
    "guard_window": 0,
    "device": "cpu",
    "seed": 1,
}


def settings(**changes: Any) -> RLSFSettings:
    algorithm = load_algorithm(changes.get("algorithm", "ppo"))
    small = {name: value for name, value in SMALL.items() if algorithm.takes(name)}
    return RLSFSettings(**{**small, **changes})


def make_reward_model(folder: Path, tokenizer: Any, *, scale: float = 10.0) -> Path:
    """Rewards the share of liked tokens, those with an even id, in the whole text: one layer of uniform attention.

    Embeddings are e0 for a liked token and e1 for another; queries and keys are 0, so attention takes the mean.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        model.model.embed_tokens.weight[0::2, 0] = 1.0
        model.model.embed_tokens.weight[1::2, 1] = 1.0
        layer = model.model.layers[0].self_attn
        layer.v_proj.weight.copy_(torch.eye(8))
        layer.o_proj.weight.copy_(3 * torch.eye(8))
        model.score.weight[0, 0], model.score.weight[0, 1] = scale, -scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: Any, tiny_checkpoint: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rlsf")
    prompts = folder / "prompts.jsonl"
    texts = ["What is a cat?", "Hello", "Say something true, and then stop.", "1 2 3", "Where is Paris?", "a dog"]
    rows = [{"id": f"p{i:05d}", "prompt": text} for i, text in enumerate(texts)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "prompts": prompts,
        "policy": str(tiny_checkpoint("llama-tied")),
        "reward_model": str(make_reward_model(folder / "reward", bpe_tokenizer)),
    }


SLOW_KEPT = [("ppo", True), ("rloo", False), ("grpo", True)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
        for row in read_rows(folder / "log.jsonl")
    ]


def same_output(one: Path, other: Path) -> None:
    for name in ("policy/model.safetensors", "samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows_of(one) == rows_of(other)


# --- learning ---

LEARNING: dict[str, dict[str, Any]] = {
    "ppo": {"steps": 20, "learning_rate": 5e-3},
    "rloo": {"steps": 24, "learning_rate": 1e-2},
    "grpo": {"steps": 24, "learning_rate": 1e-2},
}


@pytest.mark.parametrize(
    "algorithm", ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "grpo"))]
)
def test_the_reward_rises_beyond_noise(algorithm: str, world: dict[str, Any], tmp_path: Path) -> None:
    result = rlsf(settings(algorithm=algorithm, **LEARNING[algorithm]), **world, output=tmp_path)
    rows = rows_of(tmp_path)
    first, last = rows[:4], rows[-4:]
    # Means of 64 completions each; at least four standard errors of their difference apart.
    gap = sum(row["reward"] for row in last) / 4 - sum(row["reward"] for row in first) / 4
    error = math.sqrt(sum(row["reward_std"] ** 2 for row in [*first, *last]) / 4 / 64)
    assert gap > 4 * error
    assert result["metrics"]["stopped"] is None
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["kl"] > 1
    assert not (tmp_path / ".work").exists()
    sampled = read_rows(tmp_path / "samples.jsonl")
    assert set(sampled[0]) == {"step", "id", "prompt", "completion", "reward", "ended"}
    assert {row["step"] for row in sampled} >= {0, 10}
    # A plain folder: the template is inside, and the weights are those that were trained.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "Human:" in AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    start = AutoModelForCausalLM.from_pretrained(world["policy"])
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_the_saved_template_writes_bos_once_and_is_served_with_its_stops(world: dict[str, Any], tmp_path: Path) -> None:
    from almost_eval.models.chat import STOP_STRINGS
    from serving.models import find_model

    rlsf(settings(steps=1), **world, output=tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "policy")
    message = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
    assert find_model("policy", str(tmp_path / "policy")).stop == STOP_STRINGS["almost"]


def test_the_first_update_compares_a_policy_with_itself(world: dict[str, Any], tmp_path: Path) -> None:
    rlsf(settings(steps=3, micro_batch_size=2, temperature=0.8), **world, output=tmp_path)
    rows = rows_of(tmp_path)
    assert all(row["first_ratio_error"] < 1e-5 for row in rows[:-1])
    assert "first_ratio_error" not in rows[-1]  # measured, not updated


def test_what_only_saves_memory_changes_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    saving = {"micro_batch_size": 2, "sampling_batch_size": 3, "gradient_checkpointing": True}
    rlsf(settings(steps=2, ppo_epochs=2, learning_rate=1e-4), **world, output=tmp_path / "plain")
    rlsf(settings(steps=2, ppo_epochs=2, learning_rate=1e-4, **saving), **world, output=tmp_path / "other")
    near(tmp_path / "plain", tmp_path / "other", 1e-4)


def test_the_reward_model_may_be_held_in_half_the_memory(
    world: dict[str, Any], bpe_tokenizer: Any, tmp_path: Path
) -> None:
    judge = make_reward_model(tmp_path / "judge", bpe_tokenizer, scale=3.005)  # in bfloat16 it is 3
    world = {**world, "reward_model": str(judge)}
    rlsf(settings(steps=1), **world, output=tmp_path / "plain")
    rlsf(settings(steps=1, reward_dtype="bfloat16"), **world, output=tmp_path / "half")
    [plain, half] = [rows_of(tmp_path / name)[0] for name in ("plain", "half")]
    assert plain["length"] == half["length"]  # the same texts
    assert half["reward"] != plain["reward"]
    assert half["reward"] == pytest.approx(plain["reward"], abs=0.1)


def near(one: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        for name in a:
            # A ratio's rounding error and the clipping of a token at the very edge have no size to compare.
            if name not in ("first_ratio_error", "clip_share", "value_clip_share") and a[name] is not None:
                assert a[name] == pytest.approx(b[name], abs=tolerance), (a["step"], name)
    weights = [load_file(folder / "policy" / "model.safetensors") for folder in (one, other)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=tolerance, rtol=0)


@pytest.mark.slow
def test_bf16_trains(world: dict[str, Any], tmp_path: Path) -> None:
    result = rlsf(settings(steps=2, bf16=True), **world, output=tmp_path)
    assert result["metrics"]["stopped"] is None
    assert load_file(tmp_path / "policy" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16


# --- policies on the way ---


@pytest.mark.parametrize(
    ("algorithm", "bf16"), [("ppo", False), *(pytest.param(*p, marks=pytest.mark.slow) for p in SLOW_KEPT)]
)
def test_policies_on_the_way_are_kept_and_change_nothing(
    algorithm: str, bf16: bool, world: dict[str, Any], tmp_path: Path
) -> None:
    chosen = settings(algorithm=algorithm, bf16=bf16, steps=4, save_every=3, warmup_ratio=0.0)
    keeping = replace(chosen, keep_every=2)
    rlsf(chosen, **world, output=tmp_path / "plain")
    with pytest.raises(Stopped):
        rlsf(keeping, **world, output=tmp_path / "kept", progress=StopAfter(4))
    rlsf(keeping, **world, output=tmp_path / "kept")
    same_output(tmp_path / "plain", tmp_path / "kept")
    assert not (tmp_path / "plain" / "policies").exists()
    # The alignment tax finds them, in a run that is finished.
    kept = tmp_path / "kept" / "policies" / "step-000002"
    assert read_training(tmp_path / "kept").checkpoints == [(2, kept), (4, tmp_path / "kept" / "policy")]
    # Each is what a run of so many steps ends with.
    rlsf(replace(chosen, steps=2), **world, output=tmp_path / "short")
    short = tmp_path / "short" / "policy"
    assert sorted(file.name for file in kept.iterdir()) == sorted(file.name for file in short.iterdir())
    assert (kept / "model.safetensors").read_bytes() == (short / "model.safetensors").read_bytes()


def test_kl_control_and_normalisation(world: dict[str, Any], tmp_path: Path) -> None:
    changes = {"kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 100.0, "normalise_rewards": "sft"}
    rlsf(settings(steps=3, **changes), **world, output=tmp_path)
    coefficients = [row["kl_coefficient"] for row in rows_of(tmp_path)]
    # KL is 0 at first: 0.02 x (1 - 0.2 x 16 / 100); far above the target then: x (1 + 0.2 x 16 / 100).
    assert coefficients[1] == pytest.approx(0.02 * 0.968)
    assert coefficients[2] == pytest.approx(0.02 * 0.968 * 1.032)


# --- resuming ---


@pytest.mark.parametrize("after", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 6))])
def test_ppo_goes_on_to_the_same_bits(after: int, world: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(steps=6, save_every=2, samples_every=2, kl_controller="adaptive")
    whole = ppo_reference(chosen, world, tmp_path.parent)
    with pytest.raises(Stopped):
        rlsf(chosen, **world, output=tmp_path, progress=StopAfter(after))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9')  # a line cut short
    rlsf(chosen, **world, output=tmp_path)
    same_output(whole, tmp_path)


def ppo_reference(chosen: RLSFSettings, world: dict[str, Any], folder: Path) -> Path:
    output = folder / "reference"
    rlsf(chosen, **world, output=output)  # made once: a stage that is done does nothing
    return output


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_trl_goes_on_to_the_same_bits(algorithm: str, world: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(algorithm=algorithm, steps=5, save_every=2, samples_every=1)
    rlsf(chosen, **world, output=tmp_path / "whole")
    with pytest.raises(Stopped):
        rlsf(chosen, **world, output=tmp_path / "killed", progress=StopAfter(4))
    rlsf(chosen, **world, output=tmp_path / "killed")
    same_output(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [5.0, 1000.0])  # a guard's stop, and the end
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_killed_just_before_the_policy_is_saved(
    algorithm: str, limit: float, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Stopped

    chosen = settings(algorithm=algorithm, steps=8, learning_rate=3e-3, kl_limit=limit, save_every=1)
    whole = rlsf(chosen, **world, output=tmp_path / "whole")
    assert whole["metrics"]["stopped"] == ("kl" if limit == 5 else None)
    with monkeypatch.context() as patch:
        patch.setattr(f"almost_train.rlsf.{'ppo_models' if algorithm == 'ppo' else 'trl'}.save_policy", die)
        with pytest.raises(Stopped):
            rlsf(chosen, **world, output=tmp_path / "killed")
    assert rlsf(chosen, **world, output=tmp_path / "killed")["metrics"] == whole["metrics"]
    same_output(tmp_path / "whole", tmp_path / "killed")


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from almost_train.common.config import settings_from
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
torch.set_num_threads(1)
given = json.loads(sys.argv[1])
world = given["world"] | {"prompts": Path(given["world"]["prompts"])}
rlsf(settings_from(RLSFSettings, given["settings"], "settings"), **world, output=Path(given["output"]))
"""


def command(chosen: RLSFSettings, world: dict[str, Any], output: Path) -> list[str]:
    fields = settings_to_dict(chosen)
    given = {"settings": fields, "world": {k: str(v) for k, v in world.items()}, "output": str(output)}
    return [json.dumps(given)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_sigkill(algorithm: str, world: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(algorithm=algorithm, steps=30, save_every=3, stop=[])
    rlsf(chosen, **world, output=tmp_path / "whole")
    output = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *command(chosen, world, output)])
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob(".work/*-*6")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "result.json").exists()
    rlsf(chosen, **world, output=output)
    same_output(tmp_path / "whole", output)


@pytest.mark.slow
def test_two_processes_are_one_with_the_double_batch(world: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(steps=4, batch_size=16, mini_batch_size=8, micro_batch_size=4, learning_rate=2e-4, stop=[])
    rlsf(chosen, **world, output=tmp_path / "one")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*launch, *command(chosen, world, tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["metrics"]["processes"] == 2
    near(tmp_path / "one", tmp_path / "two", 1e-4)


# --- guards ---


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_kl_beyond_the_limit_stops_and_keeps_the_last_good_policy(
    algorithm: str, world: dict[str, Any], tmp_path: Path
) -> None:
    chosen = settings(algorithm=algorithm, steps=30, learning_rate=3e-3, kl_limit=5.0, save_every=1)
    metrics = rlsf(chosen, **world, output=tmp_path)["metrics"]
    rows = rows_of(tmp_path)
    assert metrics["stopped"] == "kl"
    assert rows[-1]["kl"] > 5 >= max(row["kl"] for row in rows[:-1])
    assert metrics["policy_step"] == rows[-2]["step"] > 0
    # The policy that was saved is the one of that step, trained so far and no further: a run of so many steps gives it.
    chosen = settings(algorithm=algorithm, steps=metrics["policy_step"], learning_rate=3e-3)
    rlsf(chosen, **world, output=tmp_path / "shorter")
    weights = "policy/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (tmp_path / "shorter" / weights).read_bytes()


def test_without_a_checkpoint_within_bounds_the_policy_is_the_first(world: dict[str, Any], tmp_path: Path) -> None:
    metrics = rlsf(settings(steps=30, kl_limit=0.5), **world, output=tmp_path)["metrics"]
    assert (metrics["stopped"], metrics["policy_step"]) == ("kl", 0)
    start = load_file(Path(world["policy"]) / "model.safetensors")
    assert all(torch.equal(t, start[n]) for n, t in load_file(tmp_path / "policy" / "model.safetensors").items())


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_reward_that_is_not_finite_is_one_line(
    algorithm: str, world: dict[str, Any], tmp_path: Path, bpe_tokenizer: Any
) -> None:
    world = {**world, "reward_model": str(make_reward_model(tmp_path / "reward", bpe_tokenizer, scale=math.inf))}
    with pytest.raises(RunError, match=r"step 0: \d+ of 16 values of reward are not finite; .* lower learning rate"):
        rlsf(settings(algorithm=algorithm, steps=2), **world, output=tmp_path / "out")


def test_a_policy_that_breaks_is_one_line(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step \d: .* not finite"):
        rlsf(settings(steps=3, learning_rate=1e30), **world, output=tmp_path)
    assert not (tmp_path / "policy").exists()


# --- refusals, before a weight is loaded ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mini_batch_size": 6}, "batch_size 16 is not a multiple of mini_batch_size 6"),
        ({"micro_batch_size": 3}, "an update of 8 completions does not divide among 1 processes"),
        ({"algorithm": "rloo", "num_generations": 5}, "batch_size 16 is not a multiple of num_generations 5"),
        ({"algorithm": "grpo", "kl_coefficient": 0.0}, "use a kl_coefficient above 0"),
        ({"stop": ("",)}, "an empty stop string"),
    ],
)
def test_sizes_that_do_not_go_together(
    changes: dict[str, Any], message: str, world: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        rlsf(settings(**changes), **world, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


PPO_ONLY: dict[str, Any] = {
    "mini_batch_size": 8,
    "sampling_batch_size": 8,
    "ppo_epochs": 1,
    "value_learning_rate": 1e-5,
    "value_clip": 0.5,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "normalise_rewards": "none",
    "kl_controller": "fixed",
    "kl_target": 3.0,
    "kl_horizon": 500.0,
}


@pytest.mark.parametrize(
    ("algorithm", "name", "value", "takers"),
    [
        *(("rloo", name, value, "ppo") for name, value in PPO_ONLY.items()),
        *(("grpo", name, value, "ppo") for name, value in PPO_ONLY.items()),
        ("ppo", "num_generations", 8, "rloo, grpo"),
        ("grpo", "whiten_advantages", False, "ppo, rloo"),
    ],
)
def test_a_setting_of_another_algorithm_is_refused(
    algorithm: str, name: str, value: Any, takers: str, tmp_path: Path
) -> None:
    # The models do not exist: they are not looked for.
    with pytest.raises(InputError) as error:
        rlsf(settings(algorithm=algorithm, **{name: value}), tmp_path, "no policy", "no reward", tmp_path / "out")
    assert error.value.exit_code == 2
    assert str(error.value) == (
        f"algorithm {algorithm} takes no {name} (of {takers}); leave it out, or choose another algorithm"
    )
    assert not (tmp_path / "out").exists()
    check_settings(RLSFSettings(algorithm=algorithm))


def test_every_setting_is_one_that_an_algorithm_takes() -> None:
    algorithms = [load_algorithm(name) for name in ALGORITHMS]
    names = set(settings_to_dict(RLSFSettings()))
    assert names == {name for name in names if any(algorithm.takes(name) for algorithm in algorithms)}
    assert all(algorithm.own_settings | COMMON_SETTINGS <= names for algorithm in algorithms)


def test_the_command_line_refuses_a_setting_of_another_algorithm_in_one_line(
    world: dict[str, Any], tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "almost_train.cli", "rlsf", "--prompts", str(world["prompts"])),
        *("--policy", world["policy"], "--reward-model", world["reward_model"], "--output", str(tmp_path / "out")),
        *("--algorithm", "rloo", "--value-clip", "0.5", "--gamma", "0.9"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "algorithm rloo takes no value_clip, gamma (of ppo); leave it out, or choose another algorithm"
    )
    assert len(done.stderr.strip().splitlines()) == 1


# --- another tokenizer than the reward model's ---


@pytest.fixture(scope="module")
def byte_reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model that reads a token for every byte, and 60 of them: the policy's 12 may be more text than fits."""
    from almost_eval.nano.seeded import train_tokenizer

    folder = tmp_path_factory.mktemp("byte-reward")
    tokenizer = train_tokenizer(["a"], vocab_size=259, model_max_length=60)
    make_reward_model(folder, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))
    return str(folder)


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_an_answer_ends_where_the_reward_models_context_is_full(
    algorithm: str, world: dict[str, Any], byte_reward_model: str, tmp_path: Path
) -> None:
    world = {**world, "reward_model": byte_reward_model}
    metrics = rlsf(settings(algorithm=algorithm, steps=2, samples_every=1), **world, output=tmp_path)["metrics"]
    assert metrics["stopped"] is None
    assert metrics["prompts"] >= 2
    rows, samples = rows_of(tmp_path), read_rows(tmp_path / "samples.jsonl")
    assert rows[0]["cut_for_reward"] > 0
    reader = HFRewardModel(byte_reward_model, device="cpu")
    lengths = reader.lengths([conversation((Message("user", row["prompt"]),), row["completion"]) for row in samples])
    assert max(lengths) <= 60
    # Nothing more was cut than had to be: with the longest token of the policy the answer would not have fitted.
    longest = max(len(token) for token in AutoTokenizer.from_pretrained(world["policy"]).get_vocab())
    assert max(lengths) > 60 - longest
    assert all(row["cut_for_reward"] <= 16 * (1 - row["ended"]) for row in rows)


def test_prompts_that_leave_no_room_are_counted(world: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "short", "prompt": "Hello"}, {"id": "long", "prompt": "cat " * 300}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = rlsf(settings(steps=1), **{**world, "prompts": prompts}, output=tmp_path / "out")["metrics"]
    assert (metrics["prompts"], metrics["prompts_too_long"], metrics["prompts_too_long_ids"]) == (1, 1, ["long"])
    prompts.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match="none of 1 prompts leaves room"):
        rlsf(settings(steps=1), **{**world, "prompts": prompts}, output=tmp_path / "none")


def test_a_done_stage_does_nothing_and_another_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    first = rlsf(settings(steps=1), **world, output=tmp_path)
    stamp = (tmp_path / "policy" / "model.safetensors").stat().st_mtime_ns
    assert rlsf(settings(steps=1), **world, output=tmp_path) == first
    assert (tmp_path / "policy" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(StoreError, match="seed was 1, is 2"):
        rlsf(settings(steps=1, seed=2), **world, output=tmp_path)


def test_the_policy_is_no_reward_model(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this needs a"):
        rlsf(settings(), **{**world, "reward_model": world["policy"]}, output=tmp_path / "out")


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_stdout_and_the_global_generators_are_left_alone(
    algorithm: str, world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state(), random.getstate()
    rlsf(settings(algorithm=algorithm, steps=1), **world, output=tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert capsys.readouterr().out == ""


@pytest.mark.slow  # TRL's trainers import vLLM where it is installed, which takes ten seconds
def test_ppo_and_trl_see_the_same_prompts_and_write_the_same_records(world: dict[str, Any], tmp_path: Path) -> None:
    results = {}
    for algorithm in ("ppo", "rloo"):
        chosen = settings(algorithm=algorithm, steps=1, **({} if algorithm == "ppo" else {"num_generations": 2}))
        results[algorithm] = rlsf(chosen, **world, output=tmp_path / algorithm)["metrics"]
    common = {"step", "reward", "length_adjusted_reward", "kl", "entropy", "length", "clip_share", "learning_rate"}
    common |= {"cut_for_reward"}
    for algorithm in results:
        assert common <= set(read_rows(tmp_path / algorithm / "log.jsonl")[0])
    assert set(results["ppo"]) - set(results["rloo"]) == {"value_model"}
    samples = {a: read_rows(tmp_path / a / "samples.jsonl") for a in results}
    first = {a: [row["id"] for row in rows if row["step"] == 0] for a, rows in samples.items()}
    assert len(set(first["rloo"])) == 2  # two completions of each of two prompts
    assert set(first["rloo"]) <= set(first["ppo"])
