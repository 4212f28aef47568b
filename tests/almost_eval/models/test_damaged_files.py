"""Files of a checkpoint that are damaged or contradict each other: the file is named, before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import ModelError
from almost_eval.nano import shipped

PROMPT = "\n\nHuman: How big is a panther?\n\nAssistant:"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(shipped("nano/almost"), tmp_path / "model")


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text() if file.exists() else "{}") | values))


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"{")


def _list(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("[]")


def _longer(folder: Path) -> None:
    """What a write into a file that was larger before leaves behind."""
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(bytes(100))


def _opening(number: int) -> Callable[[Path], object]:
    piece = {"SpecialToken": {"id": "<pad>", "type_id": 0}}
    single = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
    names = {"<pad>": {"id": "<pad>", "ids": [number], "tokens": ["<pad>"]}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": names}
    return lambda folder: _change(folder / "tokenizer.json", post_processor=processor)


def _rope(**values: object) -> Callable[[Path], object]:
    return lambda folder: _change(folder / "config.json", rope_parameters={"rope_theta": 10000.0, **values})


def _dropout(folder: Path) -> None:
    """Left on after a training with it."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    _change(folder / "tokenizer.json", model=model | {"dropout": 0.5})


def _class(name: str) -> Callable[[Path], object]:
    return lambda folder: _change(folder / "tokenizer_config.json", tokenizer_class=name)


def _eos(name: str) -> Callable[[Path], object]:
    return lambda folder: _change(folder / name, eos_token_id="</s>")


def _template(value: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()  # which would be read in its place
        _change(folder / "tokenizer_config.json", chat_template=value)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut("tokenizer_config.json"), r"tokenizer_config\.json cannot be read"),
        (_list("tokenizer_config.json"), r"tokenizer_config\.json cannot be read .*no JSON object"),
        (_cut("tokenizer.json"), r"tokenizer\.json"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe{{"), r"chat_template\.jinja cannot be read"),
        *(
            (_template(value), r"tokenizer_config\.json cannot be read .*its chat_template is no text, and no list of")
            for value in (["a"], [{"name": "default"}], [{"template": "{{ messages }}"}])
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer that transformers can read .*one of: "),
        (_cut("generation_config.json"), r"generation_config\.json is no JSON object"),
        (_list("generation_config.json"), r"generation_config\.json is no JSON object"),
        (_eos("generation_config.json"), r"generation_config\.json states eos_token_id: '</s>'"),
        (_eos("config.json"), r"config\.json is no valid config: .*'eos_token_id'"),
        (lambda f: _change(f / "config.json", max_position_embeddings=None), r"config\.json is no valid config"),
        (lambda f: _change(f / "config.json", pad_token_id=9999), r"states pad_token_id: 9999, and the model has 1114"),
        (
            lambda f: _change(f / "config.json", dtype="torch.float16"),
            r"config\.json is no valid config: .*torch\.float16",
        ),
        (lambda f: _change(f / "config.json", architectures="LlamaForCausalLM"), "architectures is 'LlamaForCausalLM'"),
        (
            lambda f: _change(f / "config.json", hidden_act="sillu"),
            r"config\.json says hidden_act: 'sillu', which .* mend",
        ),
        (_rope(rope_type="magic"), r"says rope_parameters\.rope_type: 'magic', which transformers does not know"),
        (lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()], "its config.json is a folder"),
        (_dropout, r'tokenizer\.json has a dropout of 0\.5: .*set "dropout" to null'),
        (_longer, r"model\.safetensors is not a whole safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        (_class("BertTokenizer"), 'cannot encode a plain text as BertTokenizer .*"PreTrainedTokenizerFast"'),
        (_class("CodeLlamaTokenizer"), "cannot encode a plain text as CodeLlamaTokenizer"),
        (_class("T5Tokenizer"), 'no tokenizer that transformers can read .*"PreTrainedTokenizerFast"'),
        (_opening(4000), r"puts the ids \[4000\] before a text, and the embedding has 1114 rows"),
        (lambda f: _change(f / "config.json", tie_word_embeddings=False), 'lacks "tie_word_embeddings": true'),
        (
            lambda f: _change(f / "tokenizer_config.json", eos_token="</none>"),
            "'</none>' .* rows .*no such token.* as its eos_token",
        ),
        (lambda f: _change(f / "special_tokens_map.json", eos_token="</none>"), "'</none>' with the id"),
    ],
)
def test_the_file_at_fault_is_named(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=words) as refused:
        HFEngine(str(folder))
    assert "\n" not in str(refused.value)


def _shards(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (at > 4)}-of-00002.safetensors" for at, name in enumerate(names)}
    for shard in set(places.values()):
        mine = {name: weights[name] for name in names if places[name] == shard}
        save_file(mine, folder / shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_an_index_that_is_gone_or_incomplete_is_told(folder: Path) -> None:
    index = _shards(folder)
    whole = json.loads(index.read_text())
    assert HFEngine(str(folder)).generate([PROMPT], SamplingParams(max_new_tokens=3))
    index.write_text(json.dumps({"weight_map": whole["weight_map"]}))
    with pytest.raises(ModelError, match='it lacks "metadata"'):
        HFEngine(str(folder))
    index.write_text(json.dumps(whole | {"metadata": None}))
    with pytest.raises(ModelError, match='it lacks "metadata"'):
        HFEngine(str(folder))
    index.write_text(json.dumps(whole | {"weight_map": {}}))
    with pytest.raises(ModelError, match="its weight_map names no file"):
        HFEngine(str(folder))
    listed = {name: shard for name, shard in whole["weight_map"].items() if "00001" in shard}
    index.write_text(json.dumps(whole | {"weight_map": listed}))
    with pytest.raises(ModelError, match=r"; model-00002-of-00002\.safetensors holds some of them, and the index does"):
        HFEngine(str(folder))
    index.unlink()
    with pytest.raises(ModelError, match=r"holds model-00001-of-00002\.safetensors but no model\.safetensors\.index"):
        HFEngine(str(folder))
    index.write_text(json.dumps(whole))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files, first model-00002-of-00002\.safetensors"):
        HFEngine(str(folder))


def test_a_list_of_ends_with_ids_that_are_none_ends_an_answer(folder: Path) -> None:
    """-1 and an id beyond the vocabulary are passed over; the token that the model writes second is an end."""
    written = HFEngine(str(folder)).generate([PROMPT], SamplingParams(max_new_tokens=4))[0][0].token_ids
    _change(folder / "generation_config.json", eos_token_id=[-1, written[1], 99_999])
    [[ended]] = HFEngine(str(folder)).generate([PROMPT], SamplingParams(max_new_tokens=4))
    assert (ended.token_ids, ended.finish_reason) == (written[:1], "stop")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    """Of two values transformers takes one, vLLM perhaps the other: accuracy was 0.19 instead of 0.94."""
    _shards(folder)
    first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    name, value = min(load_file(first).items())
    save_file(load_file(second) | {name: value + 1}, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"holds '{name}' twice, in {first.name} and in {second.name}"):
        HFEngine(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja", "generation_config.json", "config.json"])
def test_a_link_that_leads_nowhere_is_no_absent_file(folder: Path, name: str) -> None:
    """A hub cache copied without its blobs: without its template the model would be asked in another format."""
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    with pytest.raises(ModelError, match=rf"holds {name}, a link to \.\./\.\./blobs/0123, which is not there"):
        HFEngine(str(folder))


def test_other_links_may_lead_nowhere(folder: Path) -> None:
    (folder / "training.log").symlink_to("gone")
    assert HFEngine(str(folder)).context_length == 2048


def test_weights_by_other_names_are_told_beside_those_that_lack(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "decoder.inner."): weight for name, weight in weights.items()}
    save_file(renamed | {"value.weight": weights["model.norm.weight"].clone()}, folder / "model.safetensors")
    words = (
        "lacks 21 weights .*; the files hold decoder.inner.embed_tokens.weight, .* and 19 more instead: another arch"
    )
    with pytest.raises(ModelError, match=words):
        HFEngine(str(folder))
