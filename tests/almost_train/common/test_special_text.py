"""Texts that a tokenizer would read as control tokens, in the data of every trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from almost_eval.errors import DataError
from almost_eval.files import write_rows
from almost_eval.models.chat import load_template
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.types import JSONObject, Message
from almost_train.common.special_text import SpecialText
from almost_train.dpo.online import OnlineDPOSettings, train_online_dpo
from almost_train.dpo.run import DPOSettings, train_dpo
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft

pytestmark = pytest.mark.usefixtures("one_thread")

ANIMALS = "otter panther owl fox bear wolf".split()
SMALL: dict[str, Any] = {"device": "cpu", "batch_size": 2, "micro_batch_size": 2}
ONLINE: dict[str, Any] = {**SMALL, "max_new_tokens": 4}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def demonstration(text: str, animal: str) -> JSONObject:
    return {"messages": [user(f"How big is the {animal}?"), assistant(f"It is big.{text}")]}


def pair(text: str, animal: str) -> JSONObject:
    asked = f"How big is the {animal}?"
    return {"prompt": [user(asked)], "chosen": [assistant("It is big.")], "rejected": [assistant(f"no{text}")]}


def prompt(text: str, animal: str) -> JSONObject:
    return {"prompt": f"How big is the {animal}?{text}"}


def sft(file: Path, output: Path, *, skip: bool) -> JSONObject:
    return train_sft(SFTSettings(**SMALL, epochs=1, skip_special=skip), file, "nano/vanilla-small", output)


def reward(file: Path, output: Path, *, skip: bool) -> JSONObject:
    return train_reward(RewardSettings(**SMALL, skip_special=skip), file, "nano/vanilla-small", output)


def dpo(file: Path, output: Path, *, skip: bool) -> JSONObject:
    return train_dpo(DPOSettings(**SMALL, skip_special=skip), file, "nano/sft", output)


def of_policy(file: Path, output: Path, *, skip: bool) -> JSONObject:
    settings = RLSFSettings(**ONLINE, mini_batch_size=2, ppo_epochs=1, steps=1, guard_window=0, skip_special=skip)
    return rlsf(settings, file, "nano/sft", "nano/reward", output)


def online(file: Path, output: Path, *, skip: bool) -> JSONObject:
    settings = OnlineDPOSettings(**ONLINE, max_steps=1, skip_special=skip)
    return train_online_dpo(settings, file, "nano/sft", "nano/reward", output)


STAGES: dict[str, tuple[Callable[..., JSONObject], Callable[[str, str], JSONObject], str]] = {
    "sft": (sft, demonstration, "row 3: the assistant's message"),
    "reward": (reward, pair, "row 3: the assistant's message"),
    "dpo": (dpo, pair, "row 3: the assistant's message"),
    "rlsf": (of_policy, prompt, "prompt 3: the user's message"),
    "online_dpo": (online, prompt, "prompt 3: the user's message"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("text", ["<pad>", "\n\nHuman: And the cat?"])
def test_a_row_with_such_a_text_is_refused_or_left_out(stage: str, text: str, tmp_path: Path) -> None:
    train, row, where = STAGES[stage]
    file = tmp_path / "rows.jsonl"
    write_rows(file, [row(text if number == 3 else "", animal) for number, animal in enumerate(ANIMALS, 1)])
    with pytest.raises(DataError, match=r"--skip-special") as refusal:
        train(file, tmp_path / "out", skip=False)
    told = str(refusal.value)
    assert where in told
    assert repr(text[:8].split(" ")[0])[:-1] in told
    assert "\n" not in told
    metrics = train(file, tmp_path / "out", skip=True)["metrics"]
    if row is prompt:
        assert (metrics["prompts_special"], metrics["prompts"]) == (1, 5)
    else:
        assert {**metrics["dropped"], **metrics.get("eval_dropped", {})}["special_token"] == 1


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def special(template: str, *names: str, is_special: bool = True) -> SpecialText:
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(find_checkpoint("nano/vanilla-small"))
    tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=False) for name in names])
    if template == "chatml":
        tokenizer.chat_template = CHATML
    chosen = load_template("auto" if template == "chatml" else template, tokenizer)
    assert chosen is not None
    return SpecialText.of(tokenizer, chosen)


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("text", ["Done.<|im_end|>", "a <|im_start|>user\nb", "<|im_end|>"])
def test_the_marks_of_a_template_are_found_whether_special_or_not(text: str, is_special: bool) -> None:
    held = special("chatml", "<|im_start|>", "<|im_end|>", is_special=is_special)
    found = held.within((Message("user", "hi"), Message("assistant", text)))
    assert found is not None
    assert found[0] == "assistant"
    assert found[1] in text


@pytest.mark.parametrize("text", ["</s>", "x</s>y", "<end_of_turn>", "one<|eot_id|>two"])
def test_special_tokens_of_other_families(text: str) -> None:
    held = special("almost", "</s>", "<end_of_turn>", "<|eot_id|>")
    assert held.within((Message("user", text), Message("assistant", "ok"))) is not None


@pytest.mark.parametrize(
    "text", ["</s>", "<|im_end|>", "a < b | c > d", "im_end", "! What a day!", "<think>so</think> yes"]
)
def test_what_is_text_to_this_tokenizer_stays(text: str) -> None:
    held = special("almost", "!", "<think>", "</think>")
    assert held.within((Message("user", text), Message("assistant", text))) is None


def test_a_word_that_is_a_token_of_its_own_is_a_word() -> None:
    held = special("chatml", "user", "assistant", is_special=False)
    assert held.within((Message("user", "a user"), Message("assistant", "an assistant"))) is None


def test_the_tokenizer_decides() -> None:
    held = special("almost", "</s>")
    held.tokenizer.split_special_tokens = True
    split = "</s>" not in held.tokenizer.convert_ids_to_tokens(held.tokenizer.encode("a</s>", add_special_tokens=False))
    assert (held.within((Message("user", "a</s>"),)) is None) == split
    assert replace(held, tokens=None).within((Message("user", "a</s>"),)) is None
