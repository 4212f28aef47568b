"""The special tokens before a text stand there once, whatever the config names and on every path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from almost_eval.data.sources import DataSource
from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.prefix import TokenEncoder
from almost_eval.engines.vllm import VLLMEngine
from almost_eval.errors import TemplateError
from almost_eval.judge.answers import ModelSystem, Sampling
from almost_eval.judge.build import JudgeOptions, open_judge
from almost_eval.judge.records import Question
from almost_eval.models.chat import encode_text, encode_with_completion_mask, load_template, special_tokens
from almost_eval.models.tokenizers import Opening
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.rewards.vllm import VLLMRewardModel
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.types import Message
from almost_train.common.templates import keep_template
from serving.models import find_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def _checkpoint(folder: Path, name: str, *, bos_named: bool, template: str | None, prefixes: int = 1) -> Path:
    """A nano model whose post-processor writes its EOS token `prefixes` times before a text."""
    shutil.copytree(shipped(name), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    mark = str(AutoTokenizer.from_pretrained(str(folder)).eos_token)
    single = " ".join([*[mark] * prefixes, "$A"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(mark, tokenizer.token_to_id(mark))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config.pop("bos_token", None)
    if bos_named:
        config["bos_token"] = mark
    config.pop("chat_template", None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.replace("MARK", mark))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("bos_named", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_a_template_and_a_post_processor_write_the_opening_once(tmp_path: Path, bos_named: bool, written: bool) -> None:
    template = ("MARK" if written else "") + TEMPLATE
    model = _checkpoint(tmp_path / "m", "nano/almost", bos_named=bos_named, template=template)
    engine = HFEngine(str(model))
    opening = engine.encoder.opening
    assert len(opening.ids) == 1
    text = (opening.text if written else "") + "user: Hi\n"
    for ids in (engine.encoder.encode_texts([text])[0].tolist(), encode_text(engine.tokenizer, text)):
        assert ids[:2].count(opening.ids[0]) == 1

    reward = _checkpoint(tmp_path / "r", "nano/reward", bos_named=bos_named, template=template)
    [ids] = HFRewardModel(str(reward)).encode([(Message("user", "Hi"), Message("assistant", "Yes."))])
    assert ids[:2].count(opening.ids[0]) == 1


def test_the_whole_prefix_counts_and_not_its_first_token(tmp_path: Path) -> None:
    model = _checkpoint(tmp_path / "m", "nano/almost", bos_named=False, template=None, prefixes=2)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    opening = Opening.of(tokenizer)
    assert len(opening.ids) == 2
    once = TokenEncoder(tokenizer).encode_texts([opening.text + "Hi"])[0].tolist()
    assert once == TokenEncoder(tokenizer).encode_texts(["Hi"])[0].tolist()


@pytest.mark.parametrize("bos_named", [True, False])
def test_training_and_serving_write_what_evaluation_reads(tmp_path: Path, bos_named: bool) -> None:
    model = _checkpoint(tmp_path / "m", "nano/almost", bos_named=bos_named, template=None)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    chat = [{"role": "user", "content": "Hi"}]
    keep_template(tokenizer)
    trained = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    served = find_model("policy", str(model)).chat_template
    assert served is not None
    read_by_server = tokenizer.apply_chat_template(
        chat, chat_template=served, add_generation_prompt=True, return_dict=False
    )
    text = find_model("policy", str(model)).template.render((Message("user", "Hi"),), add_generation_prompt=True)
    assert trained == read_by_server == encode_text(tokenizer, text)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("processed", [True, False])
def test_a_prompt_begins_as_the_tokenizer_of_transformers_begins_it(
    tmp_path: Path, tokenizer_class: str, flag: bool, processed: bool
) -> None:
    """`add_bos_token`, which some classes obey and some do not: what they really write is what is read."""
    model = _checkpoint(tmp_path / "m", "nano/almost", bos_named=True, template=None, prefixes=int(processed))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": tokenizer_class, "add_bos_token": flag}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    text = "The cat sat"
    own = list(tokenizer(text)["input_ids"])
    assert TokenEncoder(tokenizer).encode_texts([text])[0].tolist() == own
    assert encode_text(tokenizer, text) == own


QUESTION = Question("1", "Hi")
DIALOGUE = (Message("user", "Hi"), Message("assistant", "Yes."))


def _likelihood(model: Path, engine: EngineOptions) -> None:
    options = RunRequest(
        task="hhh", protocol="choice", model=str(model), data="nano", limit=1, template="tokenizer", engine=engine
    )
    open_run(options)


def _generation(model: Path, engine: type[HFEngine] | type[VLLMEngine]) -> None:
    loaded = engine(str(model))
    template = load_template("tokenizer", loaded.tokenizer)
    assert template is not None
    text = template.render(DIALOGUE[:1], add_generation_prompt=True, special_tokens=special_tokens(loaded.tokenizer))
    loaded.generate([text], SamplingParams(max_new_tokens=1))


def _training(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    template = load_template("tokenizer", tokenizer)
    assert template is not None
    encode_with_completion_mask(tokenizer, template, DIALOGUE)


PATHS: dict[str, Callable[[Path, Path], object]] = {
    "likelihood": lambda policy, _: _likelihood(policy, EngineOptions()),
    "likelihood on vLLM": lambda policy, _: _likelihood(policy, EngineOptions(engine="vllm")),
    "generation": lambda policy, _: _generation(policy, HFEngine),
    "generation on vLLM": lambda policy, _: _generation(policy, VLLMEngine),
    "answers for a judge": lambda policy, _: ModelSystem(str(policy), [QUESTION], Sampling(max_new_tokens=4)),
    "rewards": lambda _, reward: HFRewardModel(str(reward)).score([DIALOGUE]),
    "rewards on vLLM": lambda _, reward: VLLMRewardModel(str(reward)).score([DIALOGUE]),
    "a reward model as judge": lambda _, reward: open_judge(
        JudgeOptions(judge=f"reward:{reward}"), DataSource("nano", None)
    ).check([QUESTION]),
    "training": lambda policy, _: _training(policy),
    "serving a policy": lambda policy, _: find_model("policy", str(policy)),
    "serving a reward model": lambda _, reward: find_model("reward", str(reward)),
}


@pytest.mark.parametrize("bos_named", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_template_that_writes_the_opening_twice_is_refused_on_every_path(
    tmp_path: Path, path: str, bos_named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight is read: what `transformers` loads tensors with fails."""
    monkeypatch.setattr("transformers.core_model_loading._materialize_copy", None)
    models = [
        _checkpoint(tmp_path / name.partition("/")[2], name, bos_named=bos_named, template="MARKMARK" + TEMPLATE)
        for name in ("nano/almost", "nano/reward")
    ]
    with pytest.raises(TemplateError, match=r"begins with 2 .*own encoding with 1") as refused:
        PATHS[path](*models)
    assert "\n" not in str(refused.value)


def test_an_encoders_frame_in_its_template_is_refused(tmp_path: Path) -> None:
    """The tokenizer writes `[CLS]` itself, so a template that writes it writes it once too often."""
    folder = _checkpoint(tmp_path / "r", "nano/reward", bos_named=True, template="MARK" + TEMPLATE)
    reward = HFRewardModel(str(folder))
    reward.framed = True
    with pytest.raises(TemplateError, match="begins with 2"):
        reward.encode([DIALOGUE])
