"""A folder with a PEFT adapter is a model: its base with the adapter merged into it."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import InputError, ModelError
from almost_eval.models.checkpoint import Checkpoint, find_checkpoint
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import LoglikelihoodRequest, Message
from serving.models import find_model
from serving.vllm.command import vllm_command

REQUESTS = [LoglikelihoodRequest("The panther is", (" big.", " small.")), LoglikelihoodRequest("A fox", (" runs",))]
TALK = (Message("user", "Hello?"), Message("assistant", "Hello there."))


def _train(auto: Any, base: Path, folder: Path, kind: str, **options: Any) -> Any:
    """An adapter with weights that matter, saved; and the model with it in place, not merged."""
    import torch
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(0)
    model = auto.from_pretrained(base, dtype=torch.float32, **options)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type=kind))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(shipped("nano/vanilla-medium"), tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    _train(AutoModelForCausalLM, base, tmp_path / "adapter", "CAUSAL_LM")
    return tmp_path / "adapter"


def _config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_scores_are_those_of_the_merged_checkpoint(adapter: Path, base: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    whole.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "merged")
    engine, merged, plain = (HFEngine(str(folder)) for folder in (adapter, tmp_path / "merged", base))
    scores = [[score.logprob for row in e.loglikelihood(REQUESTS) for score in row] for e in (engine, merged, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[0] != pytest.approx(scores[2], abs=1e-2)
    assert engine.report.path == "shared-prefix"


def test_base_and_adapter_are_recorded(adapter: Path, base: Path) -> None:
    engine, plain = HFEngine(str(adapter)), find_checkpoint(str(base))
    identity = engine.settings()["adapter"]
    assert identity["base"] == str(base)
    assert identity["base_digest"] == plain.weight_digest()
    before = engine.checkpoint.weight_digest()
    assert before != plain.weight_digest()
    _config(adapter, lora_alpha=99)  # the scale is in the config
    assert find_checkpoint(str(adapter)).weight_digest() != before


@pytest.mark.parametrize("name", ["../base", "nano/vanilla-medium"])
def test_the_base_is_found_beside_the_adapter_or_by_name(name: str, adapter: Path, base: Path) -> None:
    _config(adapter, base_model_name_or_path=name)
    assert find_checkpoint(str(adapter)).weight_files[0].read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_classifier_adapter_is_a_reward_model_with_its_saved_head(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "reward"
    model = _train(AutoModelForSequenceClassification, base, folder, "SEQ_CLS", num_labels=1)
    reward = HFRewardModel(str(folder))
    ids = torch.tensor(reward.encode([TALK]))
    model.config.pad_token_id = None
    expected = float(model(input_ids=ids).logits.detach().flatten()[-1])
    assert reward.score([TALK]) == pytest.approx([expected], abs=1e-4)
    with pytest.raises(ModelError, match="SEQ_CLS"):
        HFEngine(str(folder))
    with pytest.raises(ModelError, match=r"vLLM's reward server .* `almost-train merge"):
        find_model("reward", str(folder))


def _refused(folder: Path) -> str:
    with pytest.raises(ModelError) as refused:
        _ = HFEngine(str(folder)).model
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_adapter_beside_full_weights_is_refused(adapter: Path, base: Path) -> None:
    shutil.copy(adapter / "adapter_model.safetensors", base)
    assert "adapter_model.safetensors" in _refused(base)
    shutil.copy(adapter / "adapter_config.json", base)
    assert "remove adapter_*" in _refused(base)


def test_what_cannot_be_used_is_refused(adapter: Path) -> None:
    _config(adapter, base_model_name_or_path="/no/such/base")
    assert "/no/such/base" in _refused(adapter)
    _config(adapter, base_model_name_or_path=None)
    assert "names no base model" in _refused(adapter)
    _config(adapter, peft_type="PROMPT_TUNING")
    assert "PROMPT_TUNING" in _refused(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    _config(adapter, peft_type="LORA")
    assert "pickled adapter" in _refused(adapter)


def test_an_adapter_of_another_base_is_refused(adapter: Path, base: Path) -> None:
    _config(adapter, base_model_name_or_path="nano/vanilla-large")
    with pytest.raises(ModelError, match="does not fit its base"):
        HFEngine(str(adapter))  # from the headers: no weight is read


@pytest.mark.parametrize("change", ["lost", "extra", "rank"])
def test_tensors_that_are_not_those_of_its_config_are_told_before_the_base_is_read(change: str, adapter: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[0]
    if change == "lost":
        del weights[name]
    elif change == "extra":
        weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(2, 4)
    else:
        _config(adapter, r=3)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit its base"):
        HFEngine(str(adapter))


def test_a_config_of_the_base_in_the_folder_does_no_harm(adapter: Path, base: Path) -> None:
    shutil.copy(base / "config.json", adapter)
    assert HFEngine(str(adapter)).model is not None


def test_where_whole_checkpoints_are_needed_it_says_so(adapter: Path) -> None:
    _config(adapter, use_dora=True)
    with pytest.raises(ModelError, match=r"`almost-train merge .* --output DIR`"):
        find_model("policy", str(adapter))


def test_vllm_refuses_what_it_would_leave_out(adapter: Path) -> None:
    from almost_eval.engines.vllm import VLLMEngine

    assert VLLMEngine(str(adapter)).settings()["adapter"]
    for change in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"r": 1024}):
        _config(adapter, **{"use_dora": False, "bias": "none", "modules_to_save": None, **change})
        with pytest.raises(ModelError, match="vLLM cannot run"):
            VLLMEngine(str(adapter))


def _targets(checkpoint: Checkpoint) -> tuple[str, ...]:
    assert checkpoint.adapter is not None
    return checkpoint.adapter.target_modules


def test_vllm_is_told_which_layers_an_adapter_changes_and_gets_none_of_the_output_head(
    adapter: Path, base: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    assert _targets(find_checkpoint(str(adapter))) == ("q_proj", "up_proj")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(whole, LoraConfig(r=2, target_modules=["v_proj", "lm_head"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(adapter.parent / "head"))
    with pytest.raises(ModelError, match=r"output head or the embedding.*`almost-train merge"):
        find_model("policy", str(adapter.parent / "head"))
    shutil.copytree(adapter, adapter.parent / "pickled")
    (adapter.parent / "pickled" / "adapter_model.safetensors").rename(adapter.parent / "pickled" / "adapter_model.bin")
    pickled = find_checkpoint(str(adapter.parent / "pickled"), allow_pickle=True)
    assert _targets(pickled) == ("q_proj", "up_proj")  # of its config
    _config(adapter.parent / "pickled", target_modules="all-linear")
    with pytest.raises(ModelError, match="cannot be told"):
        find_model("policy", str(adapter.parent / "pickled"), allow_pickle=True)


def test_an_adapter_is_served_beside_its_base(adapter: Path, base: Path) -> None:
    for file in base.glob("*token*"):
        shutil.copy(file, adapter)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    model = find_model("policy", str(adapter))
    assert (model.name, model.template.name) == ("adapter", "tokenizer")  # the template of the adapter's folder
    command = vllm_command(model, "127.0.0.1", 1, cpu=True, memory=math.inf, environment={}).arguments
    options = dict(pairwise(command))
    assert str(base) in command
    assert options["--served-model-name"] == "adapter-base"
    assert json.loads(options["--lora-modules"]) == {"name": "adapter", "path": str(adapter)}
    assert (options["--max-lora-rank"], options["--tokenizer"]) == ("8", str(adapter))
    at = command.index("--lora-target-modules")
    assert command[at : at + 3] == ("--lora-target-modules", "q_proj", "up_proj")
    with pytest.raises(InputError, match="--lora-modules"):
        vllm_command(model, "h", 1, ["--lora-modules", "a=b"], cpu=True, memory=math.inf, environment={})


# Of different lengths and each with several scored tokens, so that vLLM reads several prompts' rows in one step.
MANY = [*REQUESTS, *(LoglikelihoodRequest("The panther is big. " * n, (" It runs home.", " A fox")) for n in (1, 2, 5))]


@pytest.mark.slow
def test_the_server_answers_with_the_adapter(adapter: Path) -> None:
    from almost_eval.engines.openai_loglikelihood import OpenAIScorer
    from serving.vllm.launch import VLLMServer

    plain = HFEngine(str(adapter)).loglikelihood(MANY)
    with VLLMServer("policy", str(adapter)) as server:
        server.wait_ready(timeout_s=300)
        served = OpenAIScorer(server.model, base_url=f"{server.url}/v1", tokenizer=str(adapter)).loglikelihood(MANY)
    for mine, theirs in zip(served, plain, strict=True):
        assert [score.logprob for score in mine] == pytest.approx([s.logprob for s in theirs], abs=1e-3)


@pytest.mark.slow
def test_vllm_gives_the_scores_and_texts_of_transformers(adapter: Path) -> None:
    from almost_eval.engines.base import SamplingParams
    from almost_eval.engines.vllm import VLLMEngine

    engine, plain = VLLMEngine(str(adapter), kv_cache_gib=0.25), HFEngine(str(adapter))
    try:
        for mine, theirs in zip(engine.loglikelihood(MANY), plain.loglikelihood(MANY), strict=True):
            assert [score.logprob for score in mine] == pytest.approx([s.logprob for s in theirs], abs=1e-3)
        params = SamplingParams(max_new_tokens=8)
        assert engine.generate(["The panther is"], params) == plain.generate(["The panther is"], params)
    finally:
        engine.close()
