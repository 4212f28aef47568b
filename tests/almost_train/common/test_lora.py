"""LoRA in the stages that train: what is saved, what stays frozen, and that the numbers are the merged checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import StopAfter, Stopped

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import InputError
from almost_eval.files import digest_path, read_rows, write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import LoglikelihoodRequest, Message
from almost_train.common.lora import LoraSettings, adapter_off, add_lora, quantization
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.models import load_policy
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft

pytestmark = pytest.mark.usefixtures("one_thread")

Tiny = Callable[[str], Path]
LORA: dict[str, Any] = {"lora_rank": 4, "learning_rate": 1e-2, "device": "cpu", "batch_size": 4, "micro_batch_size": 2}
ANIMALS = "otter panther owl fox bear wolf hare lynx cat dog".split()
REQUEST = LoglikelihoodRequest("How big is the cat?", (" Big.", " It is tiny.", " no"))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    rows = [{"messages": [turn("user", f"How big is the {a}?"), turn("assistant", "It is big.")]} for a in ANIMALS]
    write_rows(tmp_path / "demonstrations.jsonl", rows)
    return tmp_path / "demonstrations.jsonl"


@pytest.fixture
def comparisons(tmp_path: Path) -> Path:
    good, bad = [turn("assistant", "It is big.")], [turn("assistant", "no idea")]
    rows = [{"prompt": [turn("user", f"How big is the {a}?")], "chosen": good, "rejected": bad} for a in ANIMALS]
    write_rows(tmp_path / "comparisons.jsonl", rows)
    return tmp_path / "comparisons.jsonl"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"How big is the {a}?"} for a in ANIMALS])
    return tmp_path / "prompts.jsonl"


def answers(data_root: Path, n: int) -> list[tuple[Message, ...]]:
    """Answers of Static HHH."""
    file = data_root / "github/naver-ai/ALMoST/eval/data/hhh_eval.json"
    pairs = json.loads(file.read_text(encoding="utf-8"))
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")][:n]
    return [(Message("user", "Which?"), Message("assistant", text[-200:])) for text in texts]


@torch.inference_mode()
def test_a_new_adapter_changes_nothing_and_can_be_taken_off(tiny_checkpoint: Tiny) -> None:
    checkpoint = find_checkpoint(str(tiny_checkpoint("llama-gqa")))
    plain, whole = load_policy(checkpoint, "cpu"), load_policy(checkpoint, "cpu")
    whole = add_lora(whole, LoraSettings(lora_rank=2), checkpoint.path, kind="CAUSAL_LM", seed=1)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(whole(ids).logits, plain(ids).logits)
    trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    for name, parameter in trained.items():
        if ".lora_B." in name:
            parameter.fill_(0.1)
    assert not torch.allclose(whole(ids).logits, plain(ids).logits)
    with adapter_off(whole):
        assert torch.equal(whole(ids).logits, plain(ids).logits)
    again = add_lora(
        load_policy(checkpoint, "cpu"), LoraSettings(lora_rank=2), checkpoint.path, kind="CAUSAL_LM", seed=1
    )
    names = [name for name in trained if ".lora_A." in name]
    assert all(torch.equal(dict(again.named_parameters())[name], trained[name]) for name in names)  # the seed's


def test_sft_saves_an_adapter_and_whole_weights_that_agree(
    tiny_checkpoint: Tiny, demonstrations: Path, tmp_path: Path
) -> None:
    base = str(tiny_checkpoint("llama-gqa"))
    settings = SFTSettings(**LORA, merge=True, max_length=128)
    train_sft(settings, demonstrations, base, tmp_path / "sft")
    adapter, merged = tmp_path / "sft" / "adapter", tmp_path / "sft" / "model"
    assert sorted(file.name for file in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not (merged / "adapter_config.json").exists()
    mine, theirs, first = (HFEngine(str(one)).loglikelihood([REQUEST])[0] for one in (adapter, merged, base))
    assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in theirs], abs=1e-4)
    assert [s.logprob for s in mine] != pytest.approx([s.logprob for s in first], abs=1e-2)
    # The first loss is the base's: at first the adapter changes nothing.
    whole = SFTSettings(**{**LORA, "lora_rank": 0}, max_length=128)
    train_sft(whole, demonstrations, base, tmp_path / "whole")
    logs = [read_rows(tmp_path / name / "log.jsonl") for name in ("sft", "whole")]
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], abs=1e-6)
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]


@pytest.mark.slow
def test_an_sft_with_an_adapter_goes_on_to_the_same_bytes(
    tiny_checkpoint: Tiny, demonstrations: Path, tmp_path: Path
) -> None:
    base, settings = str(tiny_checkpoint("llama-gqa")), SFTSettings(**LORA, lora_dropout=0.1, save_every=2)
    with pytest.raises(Stopped):
        train_sft(settings, demonstrations, base, tmp_path / "stopped", progress=StopAfter(5))
    train_sft(settings, demonstrations, base, tmp_path / "stopped")
    train_sft(settings, demonstrations, base, tmp_path / "whole")
    assert digest_path(tmp_path / "stopped" / "model") == digest_path(tmp_path / "whole" / "model")


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
def test_a_reward_model_saves_its_head_whole_and_rewards_agree(
    architecture: str, tiny_checkpoint: Tiny, comparisons: Path, data_root: Path, tmp_path: Path
) -> None:
    settings = RewardSettings(**LORA, merge=True, epochs=4)
    train_reward(settings, comparisons, str(tiny_checkpoint(architecture)), tmp_path / "reward")
    adapter, merged = (HFRewardModel(str(tmp_path / "reward" / name)) for name in ("adapter", "model"))
    dialogues = answers(data_root, 200)
    assert len(dialogues) == 200
    rewards = adapter.score(dialogues)
    assert rewards == pytest.approx(merged.score(dialogues), abs=1e-4)
    assert len({round(reward, 3) for reward in rewards}) > 50
    log = read_rows(tmp_path / "reward" / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"] - 0.05


PPO: dict[str, Any] = {
    "lora_rank": 4,
    "steps": 4,
    "batch_size": 8,
    "mini_batch_size": 4,
    "micro_batch_size": 4,
    "max_new_tokens": 10,
    "learning_rate": 5e-3,
    "kl_limit": 1000.0,
    "guard_window": 0,
    "save_every": 2,
    "device": "cpu",
}


def play(prompts: Path, output: Path, progress: StopAfter | None = None, **changes: Any) -> dict[str, Any]:
    settings = RLSFSettings(**(PPO | changes))
    return rlsf(settings, prompts, "nano/sft", "nano/reward", output, progress=progress)


def test_ppo_measures_kl_from_the_base_with_the_adapter_off(prompts: Path, tmp_path: Path) -> None:
    play(prompts, tmp_path / "lora", merge=True)
    rows = read_rows(tmp_path / "lora" / "log.jsonl")
    assert rows[0]["kl"] == 0.0
    assert abs(rows[-1]["kl"]) > 1e-3
    # The first batch is that of training all weights: the same policy, values and draws.
    play(prompts, tmp_path / "full", lora_rank=0)
    full = read_rows(tmp_path / "full" / "log.jsonl")
    same = ("reward", "length", "entropy", "kl", "score")
    assert {name: rows[0][name] for name in same} == pytest.approx({name: full[0][name] for name in same}, abs=1e-5)
    mine, theirs = (HFEngine(str(tmp_path / "lora" / n)).loglikelihood([REQUEST])[0] for n in ("adapter", "policy"))
    assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in theirs], abs=1e-4)


def test_ppo_with_an_adapter_goes_on_to_the_same_bytes(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        play(prompts, tmp_path / "stopped", StopAfter(3))
    kept = list((tmp_path / "stopped" / ".work").rglob("policy.safetensors"))
    base = find_checkpoint("nano/sft").path / "model.safetensors"
    assert kept
    assert all(file.stat().st_size < base.stat().st_size / 2 for file in kept)  # of the adapter alone
    play(prompts, tmp_path / "stopped")
    play(prompts, tmp_path / "whole")
    assert digest_path(tmp_path / "stopped" / "policy") == digest_path(tmp_path / "whole" / "policy")


def test_a_guard_goes_back_to_the_base(prompts: Path, tmp_path: Path) -> None:
    metrics = play(prompts, tmp_path / "out", kl_limit=1e-6, save_every=100)["metrics"]
    assert (metrics["stopped"], metrics["policy_step"]) == ("kl", 0)
    mine, first = (HFEngine(m).loglikelihood([REQUEST])[0] for m in (str(tmp_path / "out" / "policy"), "nano/sft"))
    assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in first], abs=1e-5)


def test_what_does_not_go_together_is_one_line(
    tiny_checkpoint: Tiny, demonstrations: Path, prompts: Path, tmp_path: Path
) -> None:
    base = str(tiny_checkpoint("llama-gqa"))
    with pytest.raises(InputError, match="--merge without a rank; give --lora-rank"):
        train_sft(SFTSettings(**{**LORA, "lora_rank": 0}, merge=True), demonstrations, base, tmp_path / "a")
    for targets in (("foo",), ("q_proj", "foo")):  # PEFT passes over the second one where the first fits
        with pytest.raises(InputError, match=r"--lora-targets foo: no layer is called so; known: .*q_proj"):
            train_sft(SFTSettings(**LORA, lora_targets=targets), demonstrations, base, tmp_path / "b")
    with pytest.raises(InputError, match="--lora-targets q_prj: no layer is called so; did you mean 'q_proj'"):
        play(prompts, tmp_path / "c", lora_targets=("v_proj", "q_prj"), algorithm="grpo", mini_batch_size=16)
    # The corrected command is not told that the folder is another's.
    train_sft(SFTSettings(**LORA, lora_targets=("q_proj",)), demonstrations, base, tmp_path / "b")
    with pytest.raises(InputError, match="--lora-dropout, --quantize without a rank; give --lora-rank"):
        play(prompts, tmp_path / "d", lora_rank=0, lora_dropout=0.1, quantize="4bit")
    assert not (tmp_path / "d").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which holds weights in 4 bits")
def test_4_bits_without_a_gpu_are_one_line_before_anything_is_looked_for(
    demonstrations: Path, comparisons: Path, prompts: Path, tmp_path: Path
) -> None:
    bits: dict[str, Any] = {"lora_rank": 4, "quantize": "4bit", "device": "auto"}
    line = "^--quantize 4bit needs an NVIDIA GPU, and this would train on the CPU; leave it out, or train where there"
    for algorithm in ("ppo", "rloo", "grpo"):
        with pytest.raises(InputError, match=line):
            rlsf(RLSFSettings(**bits, algorithm=algorithm), prompts, "no policy", "no reward", tmp_path / algorithm)
    with pytest.raises(InputError, match=line):
        train_sft(SFTSettings(**bits), demonstrations, "nano/sft", tmp_path / "sft")
    with pytest.raises(InputError, match=line):
        train_reward(RewardSettings(**bits), comparisons, "nano/sft", tmp_path / "reward")
    assert not list(tmp_path.glob("*/stage.json"))


def test_4_bits_are_nf4_with_whole_output_layers() -> None:
    assert quantization(LoraSettings(lora_rank=4)) is None
    bits = quantization(LoraSettings(lora_rank=4, quantize="4bit"))
    assert bits is not None
    assert (bits.load_in_4bit, bits.bnb_4bit_quant_type, bits.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert bits.bnb_4bit_compute_dtype == torch.bfloat16
    assert {"lm_head", "score"} <= set(bits.llm_int8_skip_modules)


@pytest.mark.slow
def test_a_lora_on_an_adapter_belongs_to_a_base_on_disk(
    tiny_checkpoint: Tiny, demonstrations: Path, comparisons: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first" / "model"
    train_sft(SFTSettings(**LORA), demonstrations, str(tiny_checkpoint("llama-gqa")), tmp_path / "first")
    still = {**LORA, "learning_rate": 1e-9}  # next to nothing: it is the start that shows
    train_sft(SFTSettings(**still), demonstrations, str(first), tmp_path / "second")
    second = tmp_path / "second" / "model"
    base = find_checkpoint(str(second))
    assert (base.adapter is not None, base.path) == (True, tmp_path / "second" / "base")
    mine, theirs = (HFEngine(str(one)).loglikelihood([REQUEST])[0] for one in (first, second))
    assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in theirs], abs=1e-4)
    # And a reward model, whose base is whole weights while it is trained.
    for name, rank in (("whole", 0), ("lora", 4)):
        train_reward(RewardSettings(**{**LORA, "lora_rank": rank}), comparisons, str(first), tmp_path / name)
        assert HFRewardModel(str(tmp_path / name / "model")).score([(Message("user", "x"), Message("assistant", "y"))])
    assert not (tmp_path / "whole" / "base").exists()


@pytest.mark.slow
def test_dropout_of_a_reward_models_lora_acts(tiny_checkpoint: Tiny, comparisons: Path, tmp_path: Path) -> None:
    logs = {}
    for dropout in (0.0, 0.5):
        settings = RewardSettings(**LORA, lora_dropout=dropout, warmup_share=0.0)
        train_reward(settings, comparisons, str(tiny_checkpoint("llama-gqa")), tmp_path / str(dropout))
        logs[dropout] = [row["loss"] for row in read_rows(tmp_path / str(dropout) / "log.jsonl")]
    assert logs[0.0][0] == logs[0.5][0]  # the adapter is nothing yet
    assert logs[0.0][-1] != pytest.approx(logs[0.5][-1], abs=1e-3)


@pytest.mark.slow
def test_ppos_dropout_is_in_its_updates_alone_and_goes_on_to_the_same_bytes(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        play(prompts, tmp_path / "stopped", StopAfter(3), lora_dropout=0.3)
    play(prompts, tmp_path / "stopped", lora_dropout=0.3)
    play(prompts, tmp_path / "dropout", lora_dropout=0.3)
    play(prompts, tmp_path / "plain")
    policies = [digest_path(tmp_path / name / "policy") for name in ("stopped", "dropout", "plain")]
    assert policies[0] == policies[1] != policies[2]
    rows = {name: read_rows(tmp_path / name / "log.jsonl") for name in ("dropout", "plain")}
    assert rows["dropout"][0]["reward"] == rows["plain"][0]["reward"]
    # The first update meets the policy that sampled, but for what is dropped. At first that is nothing.
    assert rows["dropout"][0]["first_ratio_error"] < 1e-5 < rows["dropout"][1]["first_ratio_error"]
