"""What is refused before a weight is loaded: BOS, labels, lengths; and what `--dry-run` shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_eval.data.prompt_sets import load_prompt_set
from almost_eval.data.sources import DataSource, find_data
from almost_eval.engines.hf import HFEngine
from almost_eval.engines.scripted import ScriptedEngine
from almost_eval.errors import InputError, TemplateError
from almost_eval.models.chat import ChatTemplate, load_template, special_tokens
from almost_eval.run.prompts import describe, prepare
from almost_eval.tasks.base import Prompting
from almost_eval.tasks.hhh import HHH

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def nano() -> DataSource:
    return find_data("nano", None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights mean nothing: nothing here reads them. Its tokenizer knows " A" and " B"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from almost_eval.nano.seeded import train_tokenizer

    folder = tmp_path_factory.mktemp("no-weights")
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400}
    config |= {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    text = ["The better one is Reply A", "The better one is Reply B", "Human: Assistant: Conversation"] * 20
    train_tokenizer(text, vocab_size=400, model_max_length=2048).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads a tensor's values fails; headers and the `meta` device are open."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("almost_eval.engines.hf.load_weights", refuse)
    monkeypatch.setattr("transformers.core_model_loading._materialize_copy", refuse)


def hhh(engine: HFEngine, data: DataSource, source: str | None, **settings: Any) -> HHH:
    """HHH with a template of one's own, or none."""
    template = ChatTemplate("test", source) if source is not None else None
    prompting = Prompting(load_prompt_set("builtin", data), template, special_tokens(engine.tokenizer))
    return HHH(settings.pop("protocol", "choice"), data, prompting, limit=2, **settings)


class TestBos:
    def run(self, checkpoint: Path, nano: DataSource, source: str | None, **settings: Any) -> int:
        """BOS tokens in the first prompt, if it is accepted."""
        engine = HFEngine(str(checkpoint))
        task = hhh(engine, nano, source, **settings)
        prepared = prepare(task, engine, task.samples())
        assert "model" not in engine.__dict__  # no weight was loaded
        return int(describe(task, prepared, engine)["bos"])

    def test_as_the_tokenizer_puts_it(self, checkpoint: Path, nano: DataSource) -> None:
        assert self.run(checkpoint, nano, None) == 1
        assert self.run(checkpoint, nano, TURNS) == 1

    def test_written_by_the_template(self, checkpoint: Path, nano: DataSource) -> None:
        assert self.run(checkpoint, nano, "{{ bos_token }}" + TURNS) == 1

    @pytest.mark.parametrize("source", ["\n{{ bos_token }}", "  {{ bos_token }}"])
    def test_written_after_white_space(self, checkpoint: Path, nano: DataSource, source: str) -> None:
        # As transformers reads a rendered chat, and as rewards were read before: the template's BOS alone.
        assert self.run(checkpoint, nano, source + TURNS) == 1

    @pytest.mark.parametrize("source", ["{{ bos_token }}{{ bos_token }}"])
    def test_doubled(self, checkpoint: Path, nano: DataSource, source: str) -> None:
        with pytest.raises(TemplateError, match="begins with 2 BOS tokens, the tokenizer's own encoding with 1") as e:
            self.run(checkpoint, nano, source + TURNS)
        assert "\n" not in str(e.value)

    def test_lost(self, checkpoint: Path, nano: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
        # A prompt that begins with the BOS text in a tokenizer that does not read it as one token.
        engine = HFEngine(str(checkpoint))
        monkeypatch.setattr(type(engine.encoder), "encode_texts", without_bos(type(engine.encoder).encode_texts))
        task = hhh(engine, nano, None)
        with pytest.raises(TemplateError, match="begins with 0 BOS tokens, the tokenizer's own encoding with 1"):
            prepare(task, engine, task.samples())

    def test_before_each_turn_as_llama_2_writes_it(self, checkpoint: Path, nano: DataSource) -> None:
        source = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{% endif %}{{ m.content }}{% endfor %}"
        assert self.run(checkpoint, nano, source, protocol="likelihood") >= 1

    def test_the_word_in_the_data(self, checkpoint: Path, nano: DataSource) -> None:
        source = "{% for m in messages %}{{ m.role }}: In HTML, <s> strikes out. {{ m.content }}{% endfor %}"
        assert self.run(checkpoint, nano, source) == 2  # one in front; the other is a word of the text

    def test_one_token_for_bos_and_eos(self, checkpoint: Path, nano: DataSource, tmp_path: Path) -> None:
        """GPT-NeoX: the end of each turn is the BOS token, and none stands in front."""
        from tokenizers import processors
        from transformers import AutoTokenizer

        folder = tmp_path / "neox"
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((checkpoint / name).read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        assert self.run(folder, nano, "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}") == 1
        assert self.run(folder, nano, TURNS) == 0


def without_bos(encode: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, texts: [ids[1:] for ids in encode(self, texts)]


class TestLabels:
    def test_not_one_token_each(self, checkpoint: Path, nano: DataSource, tmp_path: Path) -> None:
        """A byte-level tokenizer with no merges: " A" is two tokens."""
        from almost_eval.nano.seeded import MIN_VOCAB_SIZE, train_tokenizer

        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
        train_tokenizer(["x"], vocab_size=MIN_VOCAB_SIZE, model_max_length=2048).save_pretrained(tmp_path)
        engine = HFEngine(str(tmp_path))
        task = hhh(engine, nano, None)
        with pytest.raises(InputError, match="no single token for each of the labels ' A', ' B'") as caught:
            prepare(task, engine, task.samples())
        assert str(caught.value).endswith("use --protocol likelihood")
        likelihood = hhh(engine, nano, None, protocol="likelihood")
        assert prepare(likelihood, engine, likelihood.samples()).requests

    def test_both_the_same(self, nano: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
        from almost_eval.engines import scripted

        real = scripted._word_ids
        monkeypatch.setattr(scripted, "_word_ids", lambda text: real("X" if text in (" A", " B") else text))
        task = HHH("choice", nano, Prompting(load_prompt_set("builtin", nano)), limit=1)
        with pytest.raises(InputError, match="no single token for each of the labels"):
            prepare(task, ScriptedEngine(lambda *_: -1.0), task.samples())


class TestDescribe:
    def test_one_sample_as_the_model_reads_it(self, checkpoint: Path, nano: DataSource) -> None:
        engine = HFEngine(str(checkpoint))
        task = hhh(engine, nano, None)
        samples = task.samples()
        prepared = prepare(task, engine, samples)
        facts = describe(task, prepared, engine)
        assert facts["samples"] == len(samples)
        assert facts["requests"] == 2 * len(samples)
        assert facts["prompt"] == task.requests(samples[0], 0)[0].context
        assert facts["prompt"].endswith("The better one is Reply")
        assert facts["continuations"] == [" A", " B"]
        assert facts["first_tokens"][0] == [0, "<s>"]
        assert len(facts["last_tokens"]) == 4
        assert facts["prompt"].endswith("".join(text for _, text in facts["last_tokens"]))
        assert [[text for _, text in label] for label in facts["labels"]] == [[" A"], [" B"]]
        assert facts["bos"] == 1
        assert facts["context_length"] == 2048
        longest = max(len(engine.encoder.encode_texts([r.context])[0]) for s in samples for r in task.requests(s, 0))
        assert facts["longest_prompt"] == longest
        assert (facts["shots_dropped_in"], facts["do_not_fit"]) == (0, 0)
        json.dumps(facts)

    def test_without_a_tokenizer(self, nano: DataSource) -> None:
        engine = ScriptedEngine(lambda *_: -1.0)
        task = HHH("choice", nano, Prompting(load_prompt_set("builtin", nano)), limit=1)
        facts = describe(task, prepare(task, engine, task.samples()), engine)
        assert facts["bos"] == 0
        assert facts["context_length"] is None

    def test_what_does_not_fit_is_counted(self, nano: DataSource) -> None:
        task = HHH("likelihood", nano, Prompting(load_prompt_set("builtin", nano)))
        samples = task.samples()
        engine = ScriptedEngine(lambda *_: -1.0)
        lengths = [max(r.n_positions for r in engine.encode(task.requests(s, 0))) for s in samples]
        limit = sorted(lengths)[len(lengths) // 2]
        short = ScriptedEngine(lambda *_: -1.0, context_length=limit)
        prepared = prepare(task, short, samples)
        too_long = {i: n for i, n in enumerate(lengths) if n > limit}
        assert prepared.too_long == too_long
        assert describe(task, prepared, short)["do_not_fit"] == len(too_long) > 0
        assert prepared.longest <= limit
        assert [len(requests) for requests in prepared.of_sample] == [
            int(i not in too_long) for i in range(len(samples))
        ]
        assert not any(prepared.truncated)


def test_digest_is_of_the_token_ids(nano: DataSource) -> None:
    engine = ScriptedEngine(lambda *_: -1.0)
    builtin = load_prompt_set("builtin", nano)

    def digest(template: str | None) -> str:
        prompting = Prompting(builtin, load_template(template) if template else None)
        task = HHH("choice", nano, prompting, limit=1)
        return prepare(task, engine, task.samples()).digest()

    assert digest(None) == digest(None)
    assert digest("alpaca") != digest("vicuna") != digest(None)
