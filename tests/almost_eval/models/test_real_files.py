"""Files of a real checkpoint that lie: its tokenizer's class, tokens without a row, adapters; refused or merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.hf import HFEngine
from almost_eval.engines.prefix import TokenEncoder
from almost_eval.errors import ModelError
from almost_eval.models.chat import encode_text
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.types import LoglikelihoodRequest

pytestmark = pytest.mark.real
REQUESTS = [LoglikelihoodRequest("The capital of France is", (" Paris", " Lyon"))]


@pytest.fixture
def copied(real_models: Any, tmp_path: Path) -> Path:
    """SmolLM2 with files that may be changed; the weights are a link."""
    folder: Path = real_models.copy(real_models.smollm2, tmp_path / "smol")
    return folder


def _change(file: Path, **values: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | values), encoding="utf-8")


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_loses_spaces_is_refused(name: str, copied: Path) -> None:
    _change(copied / "tokenizer_config.json", tokenizer_class=name, model_type=None, backend=None, is_local=None)
    with pytest.raises(ModelError, match=r"Answer:helloworld2023.*PreTrainedTokenizerFast"):
        HFEngine(str(copied))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2TokenizerFast"])
def test_a_class_that_keeps_them_is_not(name: str, copied: Path) -> None:
    config = json.loads((copied / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("model_type", "backend", "is_local"):
        config.pop(key, None)
    (copied / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}), encoding="utf-8")
    assert HFEngine(str(copied)).notes == []


def test_a_token_without_a_row_is_refused(copied: Path) -> None:
    file = copied / "tokenizer.json"
    token = {"id": 49152, "content": "<|user|>", "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
    _change(file, added_tokens=[*tokens, token])
    with pytest.raises(
        ModelError, match="'<|user|>' with the id 49152 where the embedding has 49152 rows".replace("|", "[|]")
    ):
        HFEngine(str(copied))


def test_an_adapter_is_the_model_that_peft_makes_of_it(copied: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)
    whole = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    whole.save_pretrained(str(tmp_path / "adapter"))
    ids = AutoTokenizer.from_pretrained(copied)("The capital of France is Paris", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = float(whole(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]])
    [[paris, _]] = HFEngine(str(tmp_path / "adapter")).loglikelihood(REQUESTS)
    assert paris.logprob == pytest.approx(expected, abs=1e-3)
    assert paris.logprob != pytest.approx(HFEngine(str(copied)).loglikelihood(REQUESTS)[0][0].logprob, abs=1e-3)


@pytest.mark.parametrize(("flag", "processed"), [(True, False), (False, True), (None, True)])
def test_gemmas_prompts_begin_as_transformers_begins_them(
    flag: bool | None, processed: bool, real_models: Any, tmp_path: Path
) -> None:
    """`add_bos_token` against the post-processor, which the class of transformers 5 heeds alone: BOS once or not."""
    folder = real_models.copy(real_models.gemma, tmp_path / "gemma")
    settings: dict[str, object] = {
        "tokenizer_class": "GemmaTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }
    if flag is not None:
        settings["add_bos_token"] = flag
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if not processed:
        _change(folder / "tokenizer.json", post_processor=None)
    tokenizer = load_tokenizer(find_checkpoint(str(folder)))
    encoder, text = TokenEncoder(tokenizer), "The cat sat on the mat."
    own = list(tokenizer(text)["input_ids"])
    assert own.count(2) == processed
    assert encoder.encode_texts([text])[0].tolist() == encode_text(tokenizer, text) == own
    assert encode_text(tokenizer, "<bos>" + text) == [2, *[i for i in own if i != 2]]
