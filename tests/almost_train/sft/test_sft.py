from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import StopAfter, Stopped

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.hf import HFEngine
from almost_eval.errors import DataError, InputError, RunError
from almost_eval.files import digest_path, read_rows, write_rows
from almost_eval.models.chat import STOP_STRINGS, load_template
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.types import Conversation, Message
from almost_train.common.batches import NO_LOSS
from almost_train.common.templates import keep_template
from almost_train.sft.run import SFTSettings, TrainingRow, train_sft, training_rows

BOS, EOS = 0, 1
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "batch_size": 8,
    "micro_batch_size": 2,
    "max_length": 128,
    "device": "cpu",
}


pytestmark = pytest.mark.usefixtures("one_thread")


def dialogue(*turns: str) -> Conversation:
    return tuple(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(turns))


@pytest.fixture
def base(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama-gqa")


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return load_tokenizer(find_checkpoint(str(base)))


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """11 dialogues with 14 answers: three of them have two."""
    rows: list[dict[str, Any]] = []
    for i in range(11):
        turns = dialogue(f"what is {i}?", "The cat sat on the mat.", *(("and?", "A dog.") if i < 3 else ()))
        rows.append({"id": f"d{i}", "messages": [message.to_dict() for message in turns], "rewards": [0.5]})
    write_rows(tmp_path / "demonstrations.jsonl", rows)
    return tmp_path / "demonstrations.jsonl"


def with_loss(tokenizer: Any, row: TrainingRow) -> str:
    return tokenizer.decode([label for label in row.labels if label != NO_LOSS])


def without_loss(tokenizer: Any, row: TrainingRow) -> str:
    pairs = zip(row.input_ids, row.labels, strict=True)
    assert all(label in (token, NO_LOSS) for token, label in zip(row.input_ids, row.labels, strict=True))
    return tokenizer.decode([token for token, label in pairs if label == NO_LOSS])


def test_which_tokens_carry_loss(tokenizer: Any) -> None:
    talk = dialogue("what is true?", "The cat.", "and false?", "A dog.", "thanks")
    rows, dropped = training_rows(tokenizer, keep_template(tokenizer), [talk], limit=99)
    assert not dropped
    assert [without_loss(tokenizer, row) for row in rows] == [
        "<s>\n\nHuman: what is true?\n\nAssistant:",
        "<s>\n\nHuman: what is true?\n\nAssistant: The cat.\n\nHuman: and false?\n\nAssistant:",
    ]
    assert [with_loss(tokenizer, row) for row in rows] == [" The cat.</s>", " A dog.</s>"]
    for row in rows:
        assert row.labels[-1] == row.input_ids[-1] == EOS
        assert (row.input_ids.count(BOS), row.input_ids.count(EOS)) == (1, 1)
        # What the model is given to answer when it is used is what precedes the loss here, token for token.
        first = next(at for at, label in enumerate(row.labels) if label != NO_LOSS)
        assert row.labels[:first] == [NO_LOSS] * first
        assert NO_LOSS not in row.labels[first:]


@pytest.mark.parametrize(
    ("template", "answer"),
    [("almost", " The cat.</s>"), ("vicuna", "The cat.</s>"), ("dolly", "The cat.\n\n### End</s>")],
)
def test_every_template_ends_an_answer_with_eos(tokenizer: Any, template: str, answer: str) -> None:
    chosen = load_template(template)
    assert chosen is not None
    rows, _ = training_rows(tokenizer, chosen, [dialogue("what?", "The cat.")], limit=256)
    assert with_loss(tokenizer, rows[0]).strip() == answer.strip()


def test_what_does_not_fit_is_left_out_whole(tokenizer: Any) -> None:
    long = "The cat sat on the mat, and the dog sat by the door. " * 9
    talks = [
        dialogue("what?", "The cat."),
        dialogue("what?", "The cat.", long, "A dog.", "and?", "No."),  # the first answer fits
        dialogue(long, "The cat."),
        dialogue("what?", " ", "what?", "A dog."),
        dialogue("what?"),
    ]
    rows, dropped = training_rows(tokenizer, keep_template(tokenizer), talks, limit=64)
    assert [with_loss(tokenizer, row) for row in rows] == [" The cat.</s>", " The cat.</s>", " A dog.</s>"]
    assert dropped == {"answer_too_long": 3, "dialogue_too_long": 1, "answer_empty": 1, "no_answer": 1}


def test_answers_that_are_given_or_answer_nothing_are_not_learned(tokenizer: Any) -> None:
    talks = [
        dialogue("what?", "The cat.", "and?", "A dog."),
        (Message("assistant", "The cat."), Message("user", "and?"), Message("assistant", "A dog.")),
        dialogue(" ", "The cat."),
    ]
    rows, dropped = training_rows(tokenizer, keep_template(tokenizer), talks, 64, given=[3, 0, 0])
    assert [with_loss(tokenizer, row) for row in rows] == [" A dog.</s>", " A dog.</s>"]
    assert dropped == {"no_prompt": 2, "no_answer": 1}


def test_the_loss_is_the_mean_over_a_batch_of_answers_tokens(
    base: Path, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    projected: list[int] = []
    head = utils._ChunkedLogProbFunction

    class Counted:
        @staticmethod
        def apply(hidden: torch.Tensor, *arguments: Any) -> Any:
            projected.append(len(hidden))
            return head.apply(hidden, *arguments)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)

    tokenizer = load_tokenizer(find_checkpoint(str(base)))
    talks = [tuple(Message(**m) for m in row["messages"]) for row in read_rows(demonstrations)]
    rows, _ = training_rows(tokenizer, keep_template(tokenizer), talks, limit=128)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1]  # (T - 1, V)
            labels = torch.tensor(row.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=NO_LOSS, reduction="sum"))
            count += int((labels != NO_LOSS).sum())

    # 14 answers in a batch of 16, in eight forward passes of unequal numbers of tokens: the last holds two fillers.
    settings = SFTSettings(**SETTINGS | {"batch_size": 16, "epochs": 1})
    metrics = train_sft(settings, demonstrations, str(base), tmp_path / "sft")["metrics"]
    assert metrics["answers"] == 14
    assert metrics["tokens_with_loss"] == count == sum(projected)  # the LM head reads nothing else
    (line,) = read_rows(tmp_path / "sft" / "log.jsonl")
    assert line["loss"] == pytest.approx(total / count, abs=1e-5)
    assert line.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_second"}

    # Cut otherwise, the same gradient.
    settings = SFTSettings(**SETTINGS | {"batch_size": 16, "epochs": 1, "micro_batch_size": 16})
    train_sft(settings, demonstrations, str(base), tmp_path / "at-once")
    (other,) = read_rows(tmp_path / "at-once" / "log.jsonl")
    assert other["loss"] == pytest.approx(line["loss"], abs=1e-5)
    assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)


def test_the_model_answers_and_stops(
    base: Path, demonstrations: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train_sft(SFTSettings(**SETTINGS | {"epochs": 20}), demonstrations, str(base), tmp_path / "sft")
    assert capfd.readouterr().out == ""
    assert result["metrics"]["loss_last_step"] < 0.2 * result["metrics"]["loss_first_step"]
    folder = tmp_path / "sft" / "model"
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }

    # Our engine, with the template that the tokenizer brings.
    engine = HFEngine(str(folder), device="cpu")
    template = load_template("auto", engine.tokenizer)
    assert template is not None
    assert template.name == "tokenizer"
    asked = template.render(dialogue("what is 7?"), add_generation_prompt=True, special_tokens={"bos_token": "<s>"})
    ((completion,),) = engine.generate([asked], SamplingParams(max_new_tokens=40, temperature=0.0))
    assert (completion.text.strip(), completion.finish_reason) == ("The cat sat on the mat.", "stop")

    # transformers alone: nothing but the checkpoint says where to stop, and the ids are the same.
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    ends = model.generation_config.eos_token_id
    assert EOS in ([ends] if isinstance(ends, int) else ends)
    assert model.generation_config.use_cache
    assert model.config.use_cache
    message = [{"role": "user", "content": "what is 7?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"][0].tolist() == tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert prompt["input_ids"][0].tolist().count(BOS) == 1
    written = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(written) == " The cat sat on the mat.</s>"


def test_what_was_trained_is_served_with_the_stops_of_its_format_and_bos_once(
    base: Path, demonstrations: Path, tmp_path: Path
) -> None:
    from serving.local.server import Policy
    from serving.models import find_model

    train_sft(SFTSettings(**SETTINGS | {"epochs": 1}), demonstrations, str(base), tmp_path / "sft")
    folder = str(tmp_path / "sft" / "model")
    # 1. vLLM's server: it renders the template and adds no special token.
    served = find_model("policy", folder)
    assert served.template.name == "tokenizer"
    assert served.stop == STOP_STRINGS["almost"]
    assert served.chat_template is None  # the tokenizer's own, as it is: it writes BOS
    engine = HFEngine(folder, device="cpu")
    message = [{"role": "user", "content": "what is 7?"}]
    ids = engine.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert (ids[0], ids.count(BOS)) == (BOS, 1)
    # 2. The server on transformers.
    policy = Policy("policy", engine)
    prompt = policy.prompt(dialogue("what is 7?"))
    assert policy.stop() == STOP_STRINGS["almost"]
    assert [list(one) for one in engine.encoder.encode_texts([prompt])] == [ids]


def test_stopped_and_run_again_ends_in_the_same_bits(base: Path, demonstrations: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"save_every": 3}
    with pytest.raises(Stopped):
        train_sft(SFTSettings(**settings), demonstrations, str(base), tmp_path / "stopped", progress=StopAfter(4))
    again = train_sft(SFTSettings(**settings), demonstrations, str(base), tmp_path / "stopped")
    whole = train_sft(SFTSettings(**settings), demonstrations, str(base), tmp_path / "whole")
    assert again["metrics"] == whole["metrics"]
    assert digest_path(tmp_path / "stopped" / "model") == digest_path(tmp_path / "whole" / "model")
    assert not (tmp_path / "stopped" / ".work").exists()


def test_a_loss_that_is_not_finite_ends_the_training(base: Path, demonstrations: Path, tmp_path: Path) -> None:
    settings = SFTSettings(**SETTINGS | {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_share": 0.0})
    with pytest.raises(
        RunError, match=r"the (loss|gradient) is \w+ at step \d; no checkpoint was saved before it; use a lower"
    ):
        train_sft(settings, demonstrations, str(base), tmp_path / "sft")


def test_bad_input_is_refused_before_anything_is_written(base: Path, demonstrations: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "bad.jsonl", [{"messages": [{"role": "user"}]}])
    with pytest.raises(DataError, match="row 1: a message must be"):
        train_sft(SFTSettings(**SETTINGS), tmp_path / "bad.jsonl", str(base), tmp_path / "out")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no demonstrations"):
        train_sft(SFTSettings(**SETTINGS), tmp_path / "none.jsonl", str(base), tmp_path / "out")
    with pytest.raises(InputError, match="batch_size 7"):
        train_sft(SFTSettings(**SETTINGS | {"batch_size": 7}), demonstrations, str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="leaves no answer"):
        train_sft(SFTSettings(**SETTINGS | {"max_length": 8}), demonstrations, str(base), tmp_path / "out")


def test_a_held_out_file_of_the_same_dialogues_is_named(base: Path, demonstrations: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leaves no answer to train on .*; the held-out file has all of their prompts"):
        train_sft(
            SFTSettings(**SETTINGS), demonstrations, str(base), tmp_path / "o", eval_demonstrations=demonstrations
        )
