"""Gemma 2 caps its attention logits, and sdpa leaves the caps out: a model is loaded with what honours them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import InputError
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import attention_arguments
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import LoglikelihoodRequest, Message

REQUESTS = [LoglikelihoodRequest("The cat sat on the", (" mat", " door")), LoglikelihoodRequest("hello", (" there",))]


@pytest.mark.parametrize("share", [True, False])
def test_scores_and_answers_are_those_of_eager(
    tiny_checkpoint: Callable[[str], Path], one_thread: None, share: bool
) -> None:
    path = str(tiny_checkpoint("gemma2"))
    engine = HFEngine(path, device="cpu", share_prefixes=share)
    assert engine.settings()["attention"] == "eager"
    eager, sdpa = (
        transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation=name).eval()
        for name in ("eager", "sdpa")
    )
    ids = torch.tensor([engine.tokenizer("The cat sat on the mat, and the dog")["input_ids"]])
    with torch.inference_mode():
        assert (eager(ids).logits - sdpa(ids).logits).abs().max() > 0.01  # or nothing is on trial
        for request, scores in zip(REQUESTS, engine.loglikelihood(REQUESTS), strict=True):
            for text, score in zip(request.continuations, scores, strict=True):
                whole = engine.tokenizer(request.context + text)["input_ids"]
                at = len(engine.tokenizer(request.context)["input_ids"])
                logprob = eager(torch.tensor([whole])).logits[0].log_softmax(-1)
                expected = sum(float(logprob[i - 1, whole[i]]) for i in range(at, len(whole)))
                assert score.logprob == pytest.approx(expected, abs=1e-4)
    prompts = ["The cat", "hello world, hello there; numbers", "A"]
    for prompt, [answer] in zip(prompts, engine.generate(prompts, SamplingParams(max_new_tokens=10)), strict=True):
        row = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
        alone = eager.generate(row, max_new_tokens=10, do_sample=False, pad_token_id=2)[0, row.shape[1] :]
        assert list(answer.token_ids) == [int(i) for i in alone if i not in (1, 2)]


def test_a_cap_that_only_the_class_states_counts(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("gemma2"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["attn_logit_softcapping"]
    (folder / "config.json").write_text(json.dumps(config))
    assert HFEngine(str(folder)).settings()["attention"] == "eager"
    assert attention_arguments(find_checkpoint(str(folder))) == {"attn_implementation": "eager"}
    (folder / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": None}))
    assert HFEngine(str(folder)).settings()["attention"] == "auto"
    assert attention_arguments(find_checkpoint(str(folder))) == {}


def test_sdpa_is_refused_before_weights(tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"caps its attention logits \(attn_logit_softcapping 1\), .* use .* eager"):
        HFEngine(str(tiny_checkpoint("gemma2")), attention="sdpa")
    assert HFEngine(str(tiny_checkpoint("gemma3")), attention="sdpa").settings()["attention"] == "sdpa"


def test_rewards_are_those_of_eager(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, one_thread: None) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_checkpoint("gemma2"), num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint("gemma2")).save_pretrained(tmp_path)
    talks = [(Message("user", "Hi " * n), Message("assistant", "The cat sat.")) for n in (1, 5, 9)]
    model = HFRewardModel(str(tmp_path), device="cpu")
    assert model.settings()["attention"] == "eager"
    eager = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    eager.config.pad_token_id = None
    with torch.inference_mode():
        expected = [float(eager(torch.tensor([ids])).logits) for ids in model.encode(talks)]
    assert model.score(talks) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="caps its attention logits"):
        HFRewardModel(str(tmp_path), attention="sdpa")
