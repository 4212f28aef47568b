"""An adapter as a whole checkpoint, and as the start of a training."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

import pytest

from almost_eval.engines.hf import HFEngine
from almost_eval.errors import InputError
from almost_eval.files import write_rows
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import LoglikelihoodRequest, Message
from almost_train.common.merge import merge
from almost_train.sft.run import SFTSettings, train_sft

REQUESTS = [LoglikelihoodRequest("The panther is", (" big.", " small."))]
TALK = (Message("user", "Hello?"), Message("assistant", "Hello there."))

pytestmark = pytest.mark.usefixtures("one_thread")


def make_adapter(folder: Path, kind: str = "CAUSAL_LM") -> Path:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    name = "AutoModelForCausalLM" if kind == "CAUSAL_LM" else "AutoModelForSequenceClassification"
    options = {} if kind == "CAUSAL_LM" else {"num_labels": 1}
    base = shutil.copytree(shipped("nano/vanilla-medium"), folder.parent / "base")
    model = getattr(transformers, name).from_pretrained(base, dtype=torch.float32, **options)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type=kind, use_dora=True))
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name or "score" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_checkpoint_scores_as_the_adapter_does(dtype: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    merged = merge(str(adapter), tmp_path / "new" / "merged", dtype)
    assert find_checkpoint(str(merged)).config["dtype"] == dtype
    assert filecmp.cmp(tmp_path / "base" / "tokenizer.json", merged / "tokenizer.json", shallow=False)
    scores = [
        [score.logprob for score in HFEngine(str(folder)).loglikelihood(REQUESTS)[0]] for folder in (adapter, merged)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5 if dtype == "float32" else 0.3)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["merged"]


def test_the_tokenizer_and_template_of_the_adapter_come_along(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    for file in (tmp_path / "base").glob("tokenizer*"):
        shutil.copy(file, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert (merge(str(adapter), tmp_path / "merged") / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_reward_head_is_merged_with_its_base(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", "SEQ_CLS")
    merged = merge(str(adapter), tmp_path / "merged")
    rewards = [HFRewardModel(str(folder)).score([TALK]) for folder in (adapter, merged)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_what_is_no_adapter_or_no_new_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to merge"):
        merge("nano/almost", tmp_path / "merged")
    adapter = make_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match="new folder"):
        merge(str(adapter), tmp_path / "base")


def test_sft_starts_from_an_adapter(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    rows = tmp_path / "demonstrations.jsonl"
    write_rows(rows, [{"messages": [message.to_dict() for message in TALK]}] * 2)
    settings = SFTSettings(epochs=1, batch_size=2, micro_batch_size=2, learning_rate=1e-9, device="cpu")
    train_sft(settings, rows, str(adapter), tmp_path / "sft")
    started, trained = (
        [score.logprob for score in HFEngine(str(folder)).loglikelihood(REQUESTS)[0]]
        for folder in (adapter, tmp_path / "sft" / "model")
    )
    assert trained == pytest.approx(started, abs=1e-4)  # the rate is next to nothing: it is the start that shows
