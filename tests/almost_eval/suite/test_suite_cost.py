"""What a plan says of tokens, time and money, on numbers that can be checked by hand and against a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from almost_eval.cli.main import cli
from almost_eval.engines.build import EngineOptions
from almost_eval.errors import InputError
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.progress import Progress
from almost_eval.run.runner import RunRequest
from almost_eval.suite.cost import Work, cost_on_gpus, seconds_on_gpus, smallest_split
from almost_eval.suite.hardware import SIZES, Gpu, ModelSize, size_of
from almost_eval.suite.pilot import Pilot, stretches
from almost_eval.suite.plan import SuiteRequest, plan

GPU = Gpu(memory=10**9, flops=1e12, bandwidth=1e10, source="none")
MODEL = ModelSize("ten-million", 10_000_000, 1000)


def test_the_sizes_are_those_that_were_published() -> None:
    """Parameters as the model cards of Llama 2 count them; 7B: 2 x 32 layers x 4,096 numbers of 2 bytes."""
    assert [size.parameters for size in SIZES.values()] == [6_738_415_616, 13_015_864_320, 68_976_648_192]
    assert SIZES["7b"].cache_bytes == 524_288
    assert SIZES["70b"].cache_bytes == 2 * 80 * 8 * 128 * 2


def test_a_checkpoints_size_is_counted_from_its_headers() -> None:
    size = size_of(find_checkpoint("nano/almost"))
    assert size.parameters == find_checkpoint("nano/almost").n_parameters() > 0
    assert size.cache_bytes > 0


def test_reading_by_hand() -> None:
    # 2 x 10 million parameters x 1 million tokens at 40 % of 10^12 operations a second: 50 s; two copies: 25 s
    assert seconds_on_gpus(Work("hhh", 1_000_000), MODEL, GPU, 1, 1) == pytest.approx(50)
    assert seconds_on_gpus(Work("hhh", 1_000_000), MODEL, GPU, 1, 2) == pytest.approx(25)


def test_writing_by_hand() -> None:
    """10 answers of 100 tokens behind 0 read ones."""
    work = Work("vicuna", 0, 10, 1000)
    # A step reads 20 MB of weights and 10 rows x 50 tokens x 1,000 bytes, at half of 10^10 bytes a second.
    assert seconds_on_gpus(work, MODEL, GPU, 1, 1) == pytest.approx(100 * (20e6 + 0.5e6) / 5e9)


def test_a_model_is_divided_where_one_gpu_does_not_hold_it() -> None:
    assert smallest_split(MODEL, GPU, 8) == 1
    wide = ModelSize("wide", 10**9, 1000)  # 2 GB x 1.1 of weights on GPUs with 0.9 GB for them
    assert smallest_split(wide, GPU, 8) == 4
    with pytest.raises(InputError, match="wide does not fit: its bfloat16 weights need 2 GB, and 2 GPUs have 2 GB"):
        smallest_split(wide, GPU, 2)
    cost = cost_on_gpus([Work("hhh", 1000)], wide, GPU, 8)
    assert (cost.split, cost.devices) == (4, 8)
    assert cost.money(None) is None
    assert cost.money(2.0) == pytest.approx(2.0 * 8 * cost.total_seconds / 3600)


def test_a_pilot_takes_neighbours_of_each_third() -> None:
    assert stretches(5, 50, len, tokens=60) == [[0, 1, 2, 3, 4]]
    assert stretches(30, 30, len, tokens=9) == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert stretches(4, 4, len, tokens=3) == [[0], [1], [2]]


@pytest.mark.slow
def test_the_planned_tokens_are_those_that_a_run_computes(tmp_path: Path) -> None:
    base = RunRequest(task="", model="nano/almost", data="nano", limit=3, engine=EngineOptions(dtype="float32"))
    planned, _ = plan(["hhh-choice", "truthfulqa", "mmlu"], SuiteRequest(base=base))
    pilot = Pilot(Progress())
    for one in planned:
        seconds = pilot.seconds(one)
        assert seconds is not None
        assert seconds > 0
        assert one.run is not None
        results, _ = one.run.execute(tmp_path / one.name)
        assert results["engine"]["tokens_computed"] == one.read
    assert pilot.loading > 0


def test_the_command_prints_hours_and_money_by_a_price_alone() -> None:
    words = ["plan", "--limit", "2", "--tasks", "hhh-choice,mmlu", "--gpu", "a100-80gb", "--devices", "8", "--json"]
    runner = CliRunner()
    without = runner.invoke(cli, [*words, "--sizes", "7b,70b"], catch_exceptions=False, standalone_mode=False)
    plain = json.loads(without.stdout)
    assert list(plain["sizes"]) == ["7b", "70b"]
    assert (plain["sizes"]["7b"]["split"], plain["sizes"]["70b"]["split"]) == (1, 4)
    assert all(size["usd"] is None for size in plain["sizes"].values())
    priced = [*words, "--sizes", "7b,70b", "--price-per-gpu-hour", "2"]
    paid = json.loads(runner.invoke(cli, priced, catch_exceptions=False, standalone_mode=False).stdout)
    for size in paid["sizes"].values():
        assert size["usd"] == pytest.approx(2 * size["gpu_hours"])
        assert set(size["seconds"]) == {"hhh-choice", "mmlu"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "a100"], "no rates of a GPU 'a100'; did you mean 'a100-80gb'"),
        (["--gpu", "a100-80gb", "--sizes", "8b"], "--sizes: unknown size '8b'"),
        (["--sizes", "7b"], "--sizes: say whose rates count with --gpu"),
        (["--price-per-gpu-hour", "2"], "--price-per-gpu-hour: say whose rates count with --gpu"),
        (["--gpu", "a100-80gb", "--measure"], "leave out one of them"),
    ],
)
def test_refused_before_anything_is_opened(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(cli, ["plan", *words], catch_exceptions=False, standalone_mode=False)
