"""The arithmetic of a plan, on sizes that can be checked by hand, and what it says where a stage does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModel

from almost_eval.errors import InputError
from almost_train.cli.main import cli
from almost_train.pipeline.hardware import Devices, devices, parse_memory
from almost_train.pipeline.meter import count, measured, size_of, step_peak
from almost_train.pipeline.needs import Estimator
from almost_train.pipeline.policy_needs import rlsf_need
from almost_train.pipeline.shapes import cache_bytes, load_config
from almost_train.rlsf.job import RLSFSettings
from almost_train.sft.run import SFTSettings

GPU = Devices(1, 24 * 10**9, True)


def test_a_step_of_two_layers_by_hand() -> None:
    with measured() as meter:
        model = torch.nn.Sequential(torch.nn.Linear(100, 1000, bias=False), torch.nn.Linear(1000, 10, bias=False))
        # 100 x 1,000 + 1,000 x 10 numbers of 4 bytes
        assert (count(model), size_of(model), meter.live) == (110_000, 440_000, 440_000)

        def update() -> None:
            model(torch.zeros((50, 100))).sum().backward()

        peak, mapped = step_peak(meter, [model], update, micro_batches=1, on_gpu=False)
    # AdamW's update of the larger matrix, 400,000 bytes: weights, gradients and two moments of 440,000 each, and two
    # copies of the matrix (a root and a quotient). At most one more of them is a matter of the order.
    assert 4 * 440_000 + 400_000 <= peak <= 4 * 440_000 + 3 * 400_000
    assert mapped == 0


def test_large_blocks_are_told_from_those_that_a_heap_keeps() -> None:
    with measured() as meter:
        model = torch.nn.Linear(100, 100_000, bias=False)  # its gradient and its output are 40 MB each

        def update() -> None:
            model(torch.zeros((100, 100))).sin().sum().backward()

        _, mapped = step_peak(meter, [model], update, micro_batches=1, on_gpu=False)
    # At least the output, which `sin` keeps, and the gradient.
    assert 80_000_000 <= mapped <= 160_000_000
    assert mapped % 40_000_000 == 0


def test_attention_keeps_no_matrix_of_weights() -> None:
    with measured() as meter:
        query = torch.zeros((1, 4, 1000, 8), requires_grad=True)
        before = meter.live
        output = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        # (1, 4, 1,000, 8) of output and (1, 4, 1,000) of sums, 4 bytes each; (1, 4, 1,000, 1,000) would be 16 MB.
        assert meter.live - before == 4 * (32_000 + 4_000)
        del output


def test_a_copy_of_a_parameter_without_content_is_a_parameter_of_its_own() -> None:
    with measured() as meter:
        head = torch.nn.Linear(100, 10, bias=False)
        other = copy.deepcopy(head)  # as PEFT copies a head that is trained whole
        assert meter.live == 2 * 4_000
        other.weight.data = other.weight.data.to(torch.bfloat16)
        assert (head.weight.dtype, other.weight.dtype) == (torch.float32, torch.bfloat16)
        assert isinstance(other.weight, torch.nn.Parameter)
        assert other.weight.requires_grad


def test_keys_and_values_of_llama_7b() -> None:
    # 2 x 32 layers x 32 heads x 128 numbers of 2 bytes: half a MiB a token
    assert cache_bytes(load_config("huggyllama/llama-7b"), 1, 2) == 524_288
    # SmolLM2-360M: 2 x 32 layers x 5 heads x 64 numbers
    assert cache_bytes(load_config("HuggingFaceTB/SmolLM2-360M"), 1, 2) == 2 * 32 * 5 * 64 * 2


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("huggyllama/llama-7b", 6_738_415_616),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
    ],
)
def test_parameters_are_counted_without_weights(model: str, parameters: int) -> None:
    assert Estimator(GPU).count(model) == parameters  # as their model cards have them


def test_what_a_setting_saves() -> None:
    """Each on the built-in model: what a user would expect of it, and in the column where he expects it."""
    estimator = Estimator(GPU)
    plain = estimator.sft("sft", "nano/vanilla-medium", SFTSettings(batch_size=8, micro_batch_size=8, max_length=64), 8)
    assert plain.gradients == plain.optimiser // 2 == 4 * plain.parameters
    assert 0 <= plain.weights - plain.gradients < 1000  # buffers
    lora = SFTSettings(batch_size=8, micro_batch_size=8, max_length=64, lora_rank=2, bf16=True)
    adapter = estimator.sft("sft", "nano/vanilla-medium", lora, 8)
    assert adapter.trained < plain.trained / 4
    assert adapter.optimiser == 8 * adapter.trained
    fewer = SFTSettings(batch_size=8, micro_batch_size=2, max_length=64)
    assert estimator.sft("sft", "nano/vanilla-medium", fewer, 8).activations < plain.activations
    judges = [
        rlsf_need(
            estimator, "rlsf", "nano/vanilla-medium", "nano/reward", RLSFSettings(algorithm="grpo", reward_dtype=dtype)
        ).weights
        for dtype in ("auto", "bfloat16")
    ]
    with measured():
        judge = count(AutoModel.from_config(load_config("nano/reward")))
    assert judges[0] - judges[1] == 2 * judge  # bytes
    divided = Estimator(Devices(4, 24 * 10**9, True)).sft("sft", "nano/vanilla-medium", fewer, 8)
    assert divided.weights == plain.weights // 4
    assert divided.gradients == plain.gradients // 4


def test_sizes_of_memory() -> None:
    assert parse_memory("24GB") == 24_000_000_000
    assert parse_memory("80 GiB") == 80 * 2**30
    for wrong in ("24", "0GB", "much", "-1GB"):
        with pytest.raises(InputError, match="--device-memory is"):
            parse_memory(wrong)
    with pytest.raises(InputError, match="no rates of a GPU 'a100'"):
        devices(None, None, "a100", "full")
    assert devices(None, 8, "a100-80gb", "full").describe() == "8 x a100-80gb of 80 GB, weights divided"


def test_an_allocator_that_holds_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    cpu, gpu = Devices(1, 24 * 10**9, False), Devices(1, 24 * 10**9, True)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert (cpu.old_heap, gpu.old_heap) == ("2.36", "")
    assert cpu.heap_note(4 * 10**9).startswith("glibc 2.36 may hold twice the activations, 4.0 GB more; ")
    assert cpu.heap_note(10**8) == gpu.heap_note(4 * 10**9) == ""
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libtcmalloc.so.4")
    assert cpu.heap_note(4 * 10**9) == ""
    monkeypatch.delenv("LD_PRELOAD")
    for libc in (("glibc", "2.38"), ("glibc", "2.100"), ("", "")):
        monkeypatch.setattr("platform.libc_ver", lambda found=libc: found)
        assert cpu.heap_note(4 * 10**9) == ""
        assert cpu.old_heap == ""


def write(folder: Path, **sections: object) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"prompt_set": "nano", **sections}, sort_keys=False), encoding="utf-8")
    return str(file)


def test_what_does_not_fit_is_told_with_what_to_change(tmp_path: Path) -> None:
    # 1.12 GB less the reserve and the process leave 64 MB for tensors: 4,096 tokens at once need far more, 256 do not.
    sft = {"model": "nano/vanilla-medium", "batch_size": 16, "micro_batch_size": 16, "max_length": 256}
    arguments = ["plan", write(tmp_path, sft=sft), "--device-memory", "1.12GB"]
    run = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    assert run.return_value == 3, run.output
    [stage] = json.loads(run.stdout)["stages"]
    assert (stage["fits"], stage["advice"]) == (False, "sft: micro_batch_size: 1")
    parts = ("weights", "gradients", "optimiser", "activations", "cache", "runtime")
    assert stage["total"] == sum(stage[part] for part in parts)
    fitting = {**sft, "micro_batch_size": 1}
    run = CliRunner().invoke(cli, ["plan", write(tmp_path, sft=fitting), *arguments[2:]], standalone_mode=False)
    assert run.return_value == 0, run.output
    assert "does not fit" not in run.output


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    recipe = write(tmp_path, sft={"model": str(tmp_path / "none")})
    run = CliRunner().invoke(cli, ["plan", recipe, "--device-memory", "6GB"])
    assert "recipe mine, sft: " in str(run.exception)
    run = CliRunner().invoke(cli, ["plan", "smolm"])
    assert "no recipe 'smolm'; did you mean 'smollm'?" in str(run.exception)
