"""The special tokens before a text stand there once, whatever the config names and on every path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from almost_eval.engines.hf import HFEngine
from almost_eval.engines.prefix import TokenEncoder
from almost_eval.models.chat import encode_text
from almost_eval.models.openings import Opening
from almost_eval.nano import shipped
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.common.trainers import keep_template
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
