"""Tensors that are missing, of another shape or left over are told before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed import change_config

from almost_eval.engines.hf import HFEngine
from almost_eval.engines.vllm import VLLMEngine
from almost_eval.errors import ModelError
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.tensors import check_weights
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from serving.models import find_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(shipped("nano/almost"), tmp_path / "my modèle 中文 (v2)")


def _weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _add(folder: Path, *names: str) -> None:
    import torch

    _weights(folder, lambda weights: weights.update({name: torch.ones(4) for name in names}))


def _refused(folder: Path) -> str:
    """What the engine says at once; server and training say the same."""
    messages = []
    openers: list[Callable[[], object]] = [
        lambda: HFEngine(str(folder)),
        lambda: find_model("policy", str(folder)),
        lambda: check_weights(find_checkpoint(str(folder)), "AutoModelForCausalLM"),
    ]
    for opener in openers:
        with pytest.raises(ModelError) as refused:
            opener()
        messages.append(str(refused.value))
        assert "\n" not in messages[-1]
    assert messages[0] == messages[1]
    return messages[0]


LEFT_OVER = {
    "mlp bias": ("model.layers.0.mlp.up_proj.bias", '"mlp_bias": true'),
    "attention bias": ("model.layers.0.self_attn.q_proj.bias", '"attention_bias": true'),
    "scales": ("model.layers.0.mlp.up_proj.weight_scale", "quantization_config"),
    "GPTQ": ("model.layers.0.mlp.up_proj.qweight", "quantization_config"),
    "LLM.int8": ("model.layers.0.mlp.up_proj.SCB", "quantization_config"),
    "NF4": ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "quantization_config"),
    "MXFP4": ("model.layers.0.mlp.experts.down_proj_blocks", "quantization_config"),
    "NVFP4": ("model.layers.0.mlp.up_proj.weight_scale_2", "quantization_config"),
    "experts": ("model.layers.0.mlp.experts.3.up_proj.weight", "fewer experts than the files have (4)"),
    "another head": ("score.weight", "head of another kind"),
    "an adapter": ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "adapter"),
    "anything": ("model.layers.0.something", "something"),
}


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_left_over_tensors_are_refused_by_name_and_cause(kind: str, folder: Path) -> None:
    name, cause = LEFT_OVER[kind]
    _add(folder, name)
    message = _refused(folder)
    assert name in message
    assert cause in message
    assert "or go on without them" in message


def test_biases_on_q_k_and_v_alone_are_those_of_another_type(folder: Path) -> None:
    _add(folder, *(f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv"))
    assert "Qwen2" in _refused(folder)


def test_a_bias_that_the_type_has_no_setting_for(folder: Path) -> None:
    _add(folder, "model.layers.0.mlp.up_proj.bias")
    change_config(folder, model_type="mistral", architectures=["MistralForCausalLM"])
    assert "'mistral' in config.json has no mlp_bias" in _refused(folder)


def test_other_heads_of_keys_and_values_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    change_config(folder, num_key_value_heads=heads // 2 if config["num_key_value_heads"] == heads else heads)
    assert "num_key_value_heads" in _refused(folder)


def test_what_could_not_be_compared_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_: object, **__: object) -> None:
        raise ImportError("pip install some-quantiser")

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        engine = HFEngine(str(folder))
        assert "some-quantiser" in find_model("policy", str(folder)).warning
    assert "some-quantiser" in engine.notes[0]


def test_code_of_its_own_is_told_at_once(folder: Path) -> None:
    code = {"AutoConfig": "configuration_foo.FooConfig", "AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}
    change_config(folder, model_type="foo", auto_map=code)
    with pytest.raises(ModelError, match="needs Python code that it ships") as error:
        HFEngine(str(folder))
    assert error.value.consent == "trust_remote_code"  # a command that has the flag names it


@pytest.mark.parametrize("name", ["consolidated.safetensors", "old.safetensors"])
def test_files_that_vllm_alone_would_load_are_refused(name: str, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / name)
    assert HFEngine(str(folder)).notes == []  # transformers leaves them alone
    for opener in (lambda: VLLMEngine(str(folder)), lambda: find_model("policy", str(folder))):
        with pytest.raises(ModelError, match=name):
            opener()


def test_an_index_tells_vllm_which_files_are_meant(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shutil.copy(next(folder.glob("model-*.safetensors")), folder / "old.safetensors")
    assert find_model("policy", str(folder)).warning == ""
    (folder / "old.safetensors").rename(folder / "consolidated.00.safetensors")
    with pytest.raises(ModelError, match="consolidated"):
        find_model("policy", str(folder))


def test_a_judge_takes_the_flag_too(tmp_path: Path) -> None:
    from almost_eval.data.sources import find_data
    from almost_eval.judge.build import JudgeOptions, open_judge

    reward = shutil.copytree(shipped("nano/reward"), tmp_path / "reward")
    _add(reward, "lm_head.weight")
    data = find_data("nano", None)
    with pytest.raises(ModelError, match=r"lm_head\.weight") as error:
        open_judge(JudgeOptions(judge=f"reward:{reward}"), data)
    assert error.value.consent == "allow_unused_weights"
    assert open_judge(JudgeOptions(judge=f"reward:{reward}", allow_unused_weights=True), data)


def test_left_over_tensors_are_accepted_by_a_flag_and_recorded(folder: Path) -> None:
    plain = HFEngine("nano/almost")
    _add(folder, "model.layers.0.mlp.up_proj.bias")
    engine = HFEngine(str(folder), allow_unused_weights=True)
    assert engine.settings() == plain.settings() | {"unused_weights": ["model.layers.0.mlp.up_proj.bias"]}
    assert "up_proj.bias" in engine.notes[0]
    assert engine.model is not None


def test_leftovers_that_transformers_ignores_are_no_fault(folder: Path) -> None:
    _add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert HFEngine(str(folder)).unused_weights == []


@pytest.mark.parametrize("accepted", [False, True])
def test_missing_tensors_are_always_refused(accepted: bool, folder: Path) -> None:
    _weights(folder, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    assert "up_proj.weight" in _refused(folder)
    with pytest.raises(ModelError, match="at random"):
        HFEngine(str(folder), allow_unused_weights=accepted)


def test_another_shape_is_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=json.loads((folder / "config.json").read_text())["intermediate_size"] + 8)
    assert "another shape" in _refused(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "pretrained_model."])
def test_names_as_a_wrapper_gives_them_are_told_by_their_prefix(prefix: str, folder: Path) -> None:
    def wrap(weights: dict[str, Any]) -> None:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    _weights(folder, wrap)
    assert f"the files have all names with {prefix!r} in front" in _refused(folder)


def test_whole_numbers_without_their_scales_are_refused(folder: Path) -> None:
    """Read as 3.0, a 3 makes a model that answers: 1 in 5 right where it was 19 in 20."""

    def quantise(weights: dict[str, Any]) -> None:
        for name, values in weights.items():
            weights[name] = (values * 100).char()

    _weights(folder, quantise)
    assert "weights as whole numbers: model.embed_tokens.weight, " in _refused(folder)


def test_fewer_layers_in_the_config_are_refused(folder: Path) -> None:
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change_config(folder, num_hidden_layers=layers - 1)
    assert f"the files have {layers}" in _refused(folder)


def _own_head(folder: Path, change: float) -> None:
    def add(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + change

    _weights(folder, add)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to(tied: bool, folder: Path) -> None:
    import torch

    _own_head(folder, 0.5)
    change_config(folder, tie_word_embeddings=tied)
    if tied:
        assert "tie_word_embeddings" in _refused(folder)
        engine = HFEngine(str(folder), allow_unused_weights=True)
        assert engine.unused_weights == ["lm_head.weight"]
        assert torch.equal(engine.model.lm_head.weight, engine.model.model.embed_tokens.weight)
    else:
        assert HFEngine(str(folder)).unused_weights == []


def test_a_tied_head_that_equals_the_embedding_is_fine(folder: Path) -> None:
    _own_head(folder, 0.0)
    change_config(folder, tie_word_embeddings=True)
    assert HFEngine(str(folder)).unused_weights == []


def test_a_stale_whole_file_beside_shards_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match="two sets of weights"):
        find_checkpoint(str(folder))


def test_a_reward_model_with_a_language_model_head_is_refused(tmp_path: Path) -> None:
    reward = shutil.copytree(shipped("nano/reward"), tmp_path / "reward")
    assert HFRewardModel(str(reward)).notes == []
    _add(reward, "lm_head.weight")
    for opener in (lambda: HFRewardModel(str(reward)), lambda: find_model("reward", str(reward))):
        with pytest.raises(ModelError, match="head of another kind"):
            opener()
    accepted = HFRewardModel(str(reward), allow_unused_weights=True)
    assert accepted.settings()["unused_weights"] == ["lm_head.weight"]


def test_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    for name in (tmp_path, tmp_path / "model-q4.gguf"):
        with pytest.raises(ModelError, match="GGUF"):
            find_checkpoint(str(name))


def test_links_into_a_hub_cache_and_read_only_folders_work(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(shipped("nano/almost").iterdir()):
        shutil.copy(file, blobs / f"{number:040d}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040d}")
    snapshot.chmod(0o555)
    assert HFEngine(str(snapshot)).checkpoint.weight_digest() == HFEngine("nano/almost").checkpoint.weight_digest()
