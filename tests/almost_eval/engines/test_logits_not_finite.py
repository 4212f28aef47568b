"""A model whose numbers are not finite: no score, no made-up text, and the reason beside them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from almost_eval.api import evaluate
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import RunError
from almost_eval.nano import shipped
from almost_eval.types import LoglikelihoodRequest

NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
REQUESTS = [LoglikelihoodRequest("The rabbit is", (" red.", " grey."))]
SAMPLED = {
    "greedy": SamplingParams(max_new_tokens=4),
    "sampled": SamplingParams(max_new_tokens=4, temperature=1.0),
    "nucleus": SamplingParams(max_new_tokens=4, temperature=0.7, top_p=0.9),
}


def _changed(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> str:
    """A copy of the built-in model in which one tensor is changed in place."""
    shutil.copytree(shipped("nano/almost"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("params", SAMPLED.values(), ids=SAMPLED)
def test_no_text_is_made_up_after_logits_that_are_nan(params: SamplingParams, share: bool, tmp_path: Path) -> None:
    """An argmax over NaN is the first token: greedy answers were empty, and counted as answers."""
    engine = HFEngine(_changed(tmp_path / "m", NORM, lambda w: w.fill_(math.nan)), share_prefixes=share)
    with pytest.raises(RunError, match=rf"cannot write: .* not finite.*; its weight {NORM} holds NaN .*; download"):
        engine.generate(["The rabbit is", "The lobster is"], params)


def test_what_overflows_in_float16_names_the_dtypes_that_do_not(tmp_path: Path) -> None:
    model = _changed(tmp_path / "m", DOWN, lambda w: w.mul_(3e4))
    with pytest.raises(RunError, match=r"float16 overflows beyond 65504; use the dtype bfloat16 or float32$"):
        HFEngine(model, dtype="float16").generate(["The rabbit is"], SAMPLED["greedy"])
    assert HFEngine(model, dtype="bfloat16").generate(["The rabbit is"], SAMPLED["greedy"])


@pytest.mark.parametrize("share", [True, False])
def test_scores_that_are_nan_have_their_reason_among_the_warnings(share: bool, tmp_path: Path) -> None:
    engine = HFEngine(_changed(tmp_path / "m", NORM, lambda w: w[3:4].fill_(math.nan)), share_prefixes=share)
    (scores,) = engine.loglikelihood(REQUESTS)
    assert all(math.isnan(score.logprob) for score in scores)
    said = " | ".join(engine.report.warnings)
    assert f"log-probabilities are not finite numbers: its weight {NORM} holds NaN" in said
    assert "padding changes" not in said  # nothing can be said of it
    assert "off by nan" not in said


def test_a_run_that_overflows_in_float16_has_results_without_a_headline(tmp_path: Path) -> None:
    """What rounding does was NaN, which no JSON holds: the run ended in a traceback after all its samples."""
    model = _changed(tmp_path / "m", DOWN, lambda w: w.mul_(3e4))
    run = evaluate(model, "hhh", protocol="likelihood", data="nano", limit=2, dtype="float16", output=tmp_path / "run")
    assert not run.results["validity"]["passed"]
    engine = json.loads((tmp_path / "run" / "results.json").read_text())["engine"]
    rounding = engine["rounding"]
    assert rounding["shared"] == {
        "median": None, "largest": None, "flips": rounding["shared"]["flips"], "not_finite": rounding["continuations"]
    }  # fmt: skip
    assert any("float16 overflows" in warning for warning in engine["warnings"])


@pytest.mark.parametrize("setting", ["return_dict", "output_hidden_states"])
def test_what_a_forward_pass_gives_is_not_the_checkpoints_to_say(setting: str, tmp_path: Path) -> None:
    """Tuples for outputs, as configs of old say, were a traceback."""
    plain = HFEngine("nano/almost").loglikelihood(REQUESTS)
    shutil.copytree(shipped("nano/almost"), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text()) | {"return_dict": False, "output_hidden_states": True}
    file.write_text(json.dumps(config | {"output_attentions": setting == "output_hidden_states"}))
    engine = HFEngine(str(tmp_path / "m"))
    assert engine.loglikelihood(REQUESTS) == plain
    assert engine.generate(["The rabbit is"], SAMPLED["greedy"])
