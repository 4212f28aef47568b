"""Every kind of adapter that is merged scores as PEFT does unmerged; one whose base cannot be is a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import ModelError
from almost_eval.models.adapters import refuse_for_vllm
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import shipped
from almost_eval.types import LoglikelihoodRequest
from almost_train.common.merge import merge

REQUESTS = [LoglikelihoodRequest("The panther is", (" big.", " small."))]
KINDS: dict[str, dict[str, Any]] = {
    "the head": {"target_modules": ["lm_head"]},  # of a model whose head is the embedding
    "the embedding": {"target_modules": ["embed_tokens"]},
    "head and embedding as one": {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "a whole embedding": {"modules_to_save": ["embed_tokens"]},
    "a whole norm": {"modules_to_save": ["norm"]},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 16},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "one layer": {"layers_to_transform": [0]},
    "a rank of its own": {"rank_pattern": {"q_proj": 4}},
    "some tokens": {"trainable_token_indices": [1, 2]},
    "by a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "all": {"target_modules": "all-linear"},
    "PiSSA, which takes the base apart": {"init_lora_weights": "pissa"},
    "OLoRA, which does so too": {"init_lora_weights": "olora"},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(shipped("nano/almost"), tmp_path / "base")


def _train(base: Path, folder: Path, **options: Any) -> Any:
    """PEFT's own model, unmerged, with an adapter that matters; saved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = get_peft_model(
            whole, LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)  # in place: some are tied
    model.save_pretrained(str(folder))
    return model.eval()


def _scores(model: Any, tokenizer: Any) -> list[float]:
    import torch

    context = tokenizer.encode(REQUESTS[0].context)
    scores = []
    for continuation in REQUESTS[0].continuations:
        ids = tokenizer.encode(REQUESTS[0].context + continuation)
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(len(context), len(ids))))
    return scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scores_are_those_of_peft_unmerged(kind: str, base: Path, tmp_path: Path) -> None:
    """Merged into a head that is the embedding, an adapter of the head changed the embedding too."""
    plain = HFEngine(str(base))
    expected = _scores(_train(base, tmp_path / "adapter", **KINDS[kind]), plain.tokenizer)
    [mine] = HFEngine(str(tmp_path / "adapter")).loglikelihood(REQUESTS)
    assert [score.logprob for score in mine] == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx([score.logprob for score in plain.loglikelihood(REQUESTS)[0]], abs=1e-2)
    [merged] = HFEngine(str(merge(str(tmp_path / "adapter"), tmp_path / "merged"))).loglikelihood(REQUESTS)
    assert [score.logprob for score in merged] == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    _train(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def _refused(folder: Path, **changes: object) -> str:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError) as refused:
        HFEngine(str(folder))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_base_that_is_an_adapter_is_refused_without_end(adapter: Path) -> None:
    other = shutil.copytree(adapter, adapter.parent / "other")
    assert "is itself; name a whole model" in _refused(other, base_model_name_or_path=str(other))
    _refused(adapter, base_model_name_or_path=str(other))
    assert f"is {adapter}, an adapter too" in _refused(other, base_model_name_or_path=str(adapter))  # in a ring


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": None}, "states the rank r: None"),
        ({"r": 0}, "states the rank r: 0"),
        ({"peft_type": "FUTURE"}, "of the kind FUTURE, which peft .* does not know; install the peft that made it"),
        ({"target_modules": ["nonesuch"]}, "does not fit its base"),
        ({"base_model_name_or_path": 5}, "no model at '5'"),
    ],
)
def test_what_its_config_cannot_mean_is_a_line(adapter: Path, changes: dict[str, object], words: str) -> None:
    import re

    assert re.search(words, _refused(adapter, **changes))


@pytest.mark.parametrize("changes", [{"r": 4}, {"rank_pattern": {"q_proj": 5}}])
def test_a_shape_that_is_not_that_of_its_config_is_named(adapter: Path, changes: dict[str, object]) -> None:
    """PEFT's first line says "Error(s) in loading state_dict" and no more."""
    rank = next(iter(changes.values()))
    rows = rank if isinstance(rank, int) else 5
    said = _refused(adapter, **changes)
    assert "q_proj.lora_A.weight' has the shape (2, 64)" in said
    assert f"make it ({rows}, 64): the base, r or rank_pattern is not that of its training" in said


def test_names_of_another_kind_are_told_beside_those_that_lack(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    said = _refused(adapter)
    assert "it lacks 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' and holds 'base_model" in said
    assert "lora_A.default.weight', which the base has no place for" in said


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora"])
def test_vllm_refuses_one_that_took_its_base_apart(adapter: Path, way: str) -> None:
    """It would add the adapter to the whole base."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": way}))
    found = find_checkpoint(str(adapter)).adapter
    assert found is not None
    with pytest.raises(ModelError, match=rf"took its base apart \({way}\), which vLLM cannot run: use the engine hf"):
        refuse_for_vllm(found)


def test_what_peft_thinks_of_ties_is_not_printed(base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    _train(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    recwarn.clear()
    assert HFEngine(str(tmp_path / "adapter")).model is not None
    assert [str(warning.message) for warning in recwarn] == []


def test_half_a_tokenizer_beside_an_adapter_is_looked_for_there(adapter: Path, base: Path) -> None:
    shutil.copy(base / "tokenizer_config.json", adapter)
    assert f"{adapter} has no tokenizer that transformers can read" in _refused(adapter)


def test_its_own_tokenizer_with_more_tokens_is_read(base: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path / "adapter")
    )
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    engine = HFEngine(str(tmp_path / "adapter"))
    assert len(engine.encoder.encode_texts(["<|user|>"])[0]) == 1
    assert engine.loglikelihood(REQUESTS)[0][0].logprob < 0
    assert find_checkpoint(str(tmp_path / "adapter")).tokenizer_folder == tmp_path / "adapter"


def test_a_tokenizer_of_another_model_beside_it_is_refused(adapter: Path, base: Path) -> None:
    """Each id would be another token to the base, and every number wrong without a word."""
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(base / "tokenizer_config.json", adapter)
    assert "gives 2 tokens other ids than that of its base" in _refused(adapter)
    shutil.copy(base / "tokenizer.json", adapter)
    assert HFEngine(str(adapter)).notes == []
