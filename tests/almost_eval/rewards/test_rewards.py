"""Rewards in batches against one text at a time, and every checkpoint that must be refused before it is loaded."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import processors

from almost_eval.errors import InputError, ModelError, RunError
from almost_eval.models.chat import load_template
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano import shipped
from almost_eval.nano.seeded import build_checkpoint, train_tokenizer
from almost_eval.rewards.base import RewardModel
from almost_eval.rewards.hf import HFRewardModel, _pad_id
from almost_eval.types import Conversation, Message

CONTEXT = 96  # tokens
SPECIAL = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODERS = ("llama", "gpt2", "mistral")
ENCODERS = ("bert", "roberta")

Edit = Callable[[dict[str, Any]], None]


def dialogue(question: str, answer: str) -> Conversation:
    return (Message("user", question), Message("assistant", answer))


CONVERSATIONS = [
    dialogue("Hi", "Hello."),
    dialogue("What is the capital of the valley?", "It is the town by the river, as far as I know."),
    dialogue("Hi", "No"),
    dialogue("Hi", "Hello.</s>"),  # ends in EOS twice, which is also the pad token in half of the tests
    dialogue("Hi", "Hello.<pad>"),
    dialogue("Tell me more about it, please.", "No."),
    dialogue("Hi", "Hello."),  # the first again
]


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    # The window is shorter than most of the texts.
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": CONTEXT, **WIDTHS},
    "bert": {"max_position_embeddings": CONTEXT, **WIDTHS},
    "roberta": {"max_position_embeddings": CONTEXT + 3, **WIDTHS},  # its positions count from the pad id + 1
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},  # reads the last position of the batch
}


def build(path: Path, family: str) -> Path:
    if family == "llama":
        return build_checkpoint(
            path,
            reward=True,
            hidden_size=32,
            layers=2,
            vocab_size=300,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
        )
    tokenizer = train_tokenizer(["the town by the river is the capital"], vocab_size=300, model_max_length=CONTEXT)
    if family in ENCODERS:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    config = transformers.AutoConfig.for_model(family, **SHAPES[family], **SPECIAL, initializer_range=0.2, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rewards")
    return {family: build(root / family, family) for family in (*DECODERS, *ENCODERS)}


def copied(checkpoint: Path, to: Path, *, edit: Edit | None = None, drop: str = "") -> Path:
    """The checkpoint with its config edited, and without the tensors whose name holds `drop`."""
    to.mkdir()
    for file in checkpoint.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    if edit:
        config = json.loads((to / "config.json").read_text())
        edit(config)
        (to / "config.json").write_text(json.dumps(config))
    if drop:
        tensors = load_file(to / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if drop not in name}
        assert len(kept) < len(tensors)
        save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return to


def pad_is_eos(checkpoint: Path, to: Path) -> Path:
    copied(checkpoint, to, edit=lambda config: config.update(pad_token_id=1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(to)
    return to


def one_at_a_time(path: Path, conversations: list[Conversation]) -> list[float]:
    """The plain path: one unpadded text a call, and no pad token, so that its last token is the one that is read."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = HFRewardModel(str(path)).encode(conversations)
    # Decoders only: RoBERTa needs its pad token, which says where positions begin.
    if hasattr(model, "score"):
        model.config.pad_token_id = None
    with torch.inference_mode():
        return [float(model(torch.tensor([ids])).logits) for ids in rows]


def refuse_to_load(*_: Any, **__: Any) -> Any:
    raise AssertionError("weights were loaded")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("almost_eval.rewards.hf.load_weights", refuse_to_load)


# --- right answers ---


@pytest.mark.parametrize("eos_pads", [False, True], ids=["pad", "pad=eos"])
@pytest.mark.parametrize("family", DECODERS)
def test_batches_equal_one_text_at_a_time(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, eos_pads: bool
) -> None:
    path = pad_is_eos(checkpoints[family], tmp_path / family) if eos_pads else checkpoints[family]
    truth = one_at_a_time(path, CONVERSATIONS)
    assert len({round(reward, 4) for reward in truth}) == len(CONVERSATIONS) - 1  # a mix-up would show
    for batch_size in (1, 3, None):
        model = HFRewardModel(str(path), batch_size=batch_size)
        assert model.score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
        assert model.padding_is_exact
        assert model.warnings == []
        assert model.model.config.pad_token_id == (1 if eos_pads else 2)  # as it was
    assert isinstance(model, RewardModel)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_without_a_pad_token(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    path = copied(checkpoints[family], tmp_path / family, edit=lambda config: config.update(pad_token_id=None))
    truth = one_at_a_time(path, CONVERSATIONS)
    assert HFRewardModel(str(path)).score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_read_the_frame_of_their_tokenizer(checkpoints: dict[str, Path], family: str) -> None:
    truth = one_at_a_time(checkpoints[family], CONVERSATIONS)
    for batch_size in (1, 3, None):
        model = HFRewardModel(str(checkpoints[family]), batch_size=batch_size)
        assert model.score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
    ids = model.encode(CONVERSATIONS)[0]
    assert (ids[0], ids.count(0), ids[-1], ids.count(1)) == (0, 1, 1, 1)  # <s> ... </s>, each once
    assert model.context_length == CONTEXT  # RoBERTa's config says 99
    whole = dialogue("Hi", "a" * (CONTEXT - len(model.encode([dialogue("Hi", "a")])[0]) + 1))
    assert model.lengths([whole]) == [CONTEXT]
    assert math.isfinite(model.score([whole])[0])


def test_a_model_that_padding_changes_gets_one_text_at_a_time(tmp_path: Path) -> None:
    path = build(tmp_path / "xlnet", "xlnet")
    model = HFRewardModel(str(path))
    assert model.score(CONVERSATIONS) == pytest.approx(one_at_a_time(path, CONVERSATIONS), abs=1e-5)
    assert model.warnings == ["padding changes this model's rewards: each text is computed on its own"]


def test_the_pad_token_is_in_no_text() -> None:
    assert _pad_id([(0, 4, 1), (0, 1)], own=2, vocabulary=300) == 2
    assert _pad_id([(0, 4, 1), (0, 1)], own=1, vocabulary=300) == 2  # 0 and 1 are taken
    assert _pad_id([(0, 4, 1), (0, 1)], own=None, vocabulary=300) == 2
    assert _pad_id([(0, 4, 1)], own=-1, vocabulary=300) == 2  # older Llama configs
    assert _pad_id([(0, 2, 1), (0, 3, 0)], own=3, vocabulary=4) == 2  # all are taken, but no text ends in 2


def test_rewards_that_are_not_finite_come_back_as_they_are(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = copied(checkpoints["llama"], tmp_path / "broken")
    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = np.full_like(tensors["score.weight"], np.nan)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert all(math.isnan(reward) for reward in HFRewardModel(str(path)).score(CONVERSATIONS))


# --- text ---


def test_the_default_template_closes_the_answer_with_eos(checkpoints: dict[str, Path]) -> None:
    model = HFRewardModel(str(checkpoints["llama"]))
    assert model.render(CONVERSATIONS[0]) == "\n\nHuman: Hi\n\nAssistant: Hello.</s>"
    ids = model.encode(CONVERSATIONS)[0]
    assert (ids[0], ids.count(0), ids[-1], ids.count(1)) == (0, 1, 1, 1)
    assert model.lengths(CONVERSATIONS[:1]) == [len(ids)]
    vicuna = HFRewardModel(str(checkpoints["llama"]), template=load_template("vicuna"))
    assert "USER: Hi ASSISTANT: Hello." in vicuna.render(CONVERSATIONS[0])


# --- batches ---


def counting(model: HFRewardModel) -> list[list[tuple[int, ...]]]:
    """Every batch that the model computes from now on."""
    batches: list[list[tuple[int, ...]]] = []
    forward = model._forward
    assert model.padding_is_exact  # its own batches do not count

    def forward_and_count(batch: Any) -> list[float]:
        batches.append(list(batch))
        return forward(batch)

    model._forward = forward_and_count  # type: ignore[method-assign]
    return batches


def test_a_text_that_occurs_twice_is_computed_once(checkpoints: dict[str, Path]) -> None:
    model = HFRewardModel(str(checkpoints["llama"]), batch_size=3)
    batches = counting(model)
    rewards = model.score(CONVERSATIONS)
    assert rewards[0] == rewards[6]
    assert [len(batch) for batch in batches] == [3, 3]
    lengths = [len(ids) for batch in batches for ids in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_a_resumed_run_computes_the_same_batches(checkpoints: dict[str, Path]) -> None:
    model = HFRewardModel(str(checkpoints["llama"]), batch_size=2)
    batches = counting(model)
    whole = dict(model.stream(CONVERSATIONS))
    plan = list(batches)
    for wanted in ({2}, {1, 6}, [0, 3, 5], set(range(7))):
        batches.clear()
        part = dict(model.stream(CONVERSATIONS, wanted))
        assert part == {index: whole[index] for index in wanted}  # bit for bit
        assert [batch for batch in plan if batch in batches] == batches
    batches.clear()
    assert dict(model.stream(CONVERSATIONS, {2})) == {2: whole[2]}
    assert len(batches) == 1


def test_batches_stay_below_the_token_limit(checkpoints: dict[str, Path]) -> None:
    model = HFRewardModel(str(checkpoints["llama"]), batch_tokens=100)
    batches = counting(model)
    model.score(CONVERSATIONS)
    assert len(batches) > 1
    assert all(len(batch) * len(batch[0]) <= 100 for batch in batches)


def test_out_of_memory_halves_the_batch(checkpoints: dict[str, Path]) -> None:
    model = HFRewardModel(str(checkpoints["llama"]))
    truth = model.score(CONVERSATIONS)
    forward = model._forward

    def small_only(batch: Any, most: int = 2) -> list[float]:
        if len(batch) > most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return forward(batch)

    model._forward = small_only  # type: ignore[method-assign]
    assert model.score(CONVERSATIONS) == pytest.approx(truth, abs=1e-5)
    assert model.warnings[-1].startswith("out of memory")
    model._forward = lambda batch: small_only(batch, 0)  # type: ignore[method-assign]
    with pytest.raises(RunError, match="not enough memory on cpu for one text"):
        model.score(CONVERSATIONS)


# --- what is refused, before any weight is loaded ---


@pytest.mark.usefixtures("no_weights")
def test_nothing_is_loaded_before_it_is_needed(checkpoints: dict[str, Path]) -> None:
    model = HFRewardModel(str(checkpoints["llama"]))
    assert model.lengths(CONVERSATIONS)
    assert model.score([]) == []
    assert list(model.stream(CONVERSATIONS, [])) == []
    with pytest.raises(AssertionError, match="weights were loaded"):
        model.score(CONVERSATIONS)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("family", "head"), [("llama", "score."), ("gpt2", "score."), ("bert", "classifier.")])
def test_a_missing_head_is_refused(checkpoints: dict[str, Path], tmp_path: Path, family: str, head: str) -> None:
    path = copied(checkpoints[family], tmp_path / "headless", drop=head)
    with pytest.raises(ModelError, match=r"has no score head .* transformers would set it at random"):
        HFRewardModel(str(path))


def test_another_missing_tensor_is_refused_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = copied(checkpoints["llama"], tmp_path / "partial", drop="layers.1.mlp.up_proj")
    with pytest.raises(ModelError, match="lacks 1 weights of its own architecture"):
        HFRewardModel(str(path)).score(CONVERSATIONS)


@pytest.mark.usefixtures("no_weights")
def test_a_language_model_is_refused(tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / "policy", hidden_size=32, layers=1, vocab_size=300)
    with pytest.raises(ModelError, match=r"holds a LlamaForCausalLM; this needs a \*SequenceClassification\*"):
        HFRewardModel(str(path))
    with pytest.raises(ModelError, match="not a reward model"):
        HFRewardModel(find_checkpoint(str(path)))  # found for another use


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("labels", [2, 3])
def test_more_than_one_label_is_refused(checkpoints: dict[str, Path], tmp_path: Path, labels: int) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoints["llama"])
    config.num_labels = labels  # with two, the saved config says nothing
    path = copied(checkpoints["llama"], tmp_path / "classifier")
    config.save_pretrained(path)
    with pytest.raises(ModelError, match=f"a classifier with {labels} labels"):
        HFRewardModel(str(path))


@pytest.mark.usefixtures("no_weights")
def test_nothing_is_cut(checkpoints: dict[str, Path]) -> None:
    model = HFRewardModel(str(checkpoints["llama"]))
    long = dialogue("Hi", "no " * CONTEXT)
    assert model.lengths([long])[0] > CONTEXT
    with pytest.raises(InputError, match=rf"1 of 8 .* context of {CONTEXT} tokens, first number 7"):
        model.score([*CONVERSATIONS, long])
    short = HFRewardModel(str(checkpoints["llama"]), max_length=20)
    with pytest.raises(InputError, match="context of 20 tokens"):
        short.score(CONVERSATIONS)


@pytest.mark.usefixtures("no_weights")
def test_settings_that_cannot_work(checkpoints: dict[str, Path]) -> None:
    path = str(checkpoints["llama"])
    with pytest.raises(InputError, match="unknown dtype"):
        HFRewardModel(path, dtype="float8")
    with pytest.raises(InputError, match="unknown attention"):
        HFRewardModel(path, attention="fast")
    with pytest.raises(InputError, match=f"beyond the model's own context of {CONTEXT}"):
        HFRewardModel(path, max_length=CONTEXT + 1)


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, almost_eval.rewards.hf; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_of_several_templates_is_chosen_by_its_name(almost_eval: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(shipped("nano/reward"), folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rm", "template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    command = ("hhh", "--protocol", "reward", "--data", "nano", "--limit", 1, "--model", folder)
    code, _, err = almost_eval(*command)
    assert code == 2
    assert "--template tokenizer:rm" in err
    assert almost_eval(*command, "--template", "tokenizer:rm", "--output", tmp_path / "run").code in (0, 3)
    assert json.loads((tmp_path / "run/spec.json").read_text())["template"]["name"] == "tokenizer:rm"
    assert almost_eval("verify", tmp_path / "run", "--model", folder).code == 0
