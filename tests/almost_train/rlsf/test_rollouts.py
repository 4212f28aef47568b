"""Sampling and log-probabilities on real tiny models of several architectures."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from almost_eval.models.chat import load_template
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano.seeded import build_checkpoint
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.rlsf.models import ValueModel, completion_values, load_policy, load_value_model, rescaled
from almost_train.rlsf.ppo import entropy
from almost_train.rlsf.rollouts import (
    as_sampled,
    batch_prompts,
    collate,
    completion_logits,
    completion_logprobs,
    conversation,
    read_prompts,
    sample,
    uniforms,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("Hello", "Where is Paris, and why?", "1 2 3", "a")
ROWS = [(f"p{number}", (Message("user", text),)) for number, text in enumerate(TEXTS)]


@pytest.fixture
def policy(tiny_checkpoint: Callable[[str], Path]) -> Any:
    return load_policy(find_checkpoint(str(tiny_checkpoint("llama-gqa"))), "cpu")


def prompt_ids(tokenizer: Any) -> list[tuple[int, ...]]:
    template = load_template("almost")
    assert template is not None
    return [prompt.token_ids for prompt in read_prompts(ROWS, tokenizer, template)]


# --- prompts ---


def test_a_prompt_is_written_by_the_template_with_bos_once(bpe_tokenizer: Any) -> None:
    template = load_template("auto", bpe_tokenizer)
    assert template is not None
    [prompt] = read_prompts(ROWS[:1], bpe_tokenizer, template)
    assert prompt.rendered == "\n\nHuman: Hello\n\nAssistant:"
    assert bpe_tokenizer.decode(prompt.token_ids) == "<s>" + prompt.rendered


def test_every_prompt_is_used_once_before_any_is_used_again(bpe_tokenizer: Any) -> None:
    template = load_template("almost")
    assert template is not None
    prompts = read_prompts(ROWS, bpe_tokenizer, template)
    order = [p.id for step in range(6) for p in batch_prompts(prompts, 3, step, 2)]
    assert sorted(order[:4]) == sorted(order[4:8]) == sorted(order[8:]) == ["p0", "p1", "p2", "p3"]
    assert order[:4] != order[4:8] or order[4:8] != order[8:]


# --- sampling ---


def test_a_token_is_the_inverse_of_the_cumulative_distribution(policy: Any, bpe_tokenizer: Any) -> None:
    [prompt] = prompt_ids(bpe_tokenizer)[:1]
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[0, -1]
    below = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
    numbers = torch.tensor([[0.0], [0.25], [0.5], [0.999999]], dtype=torch.float64)
    drawn = sample(policy, bpe_tokenizer, [prompt] * 4, numbers, temperature=0.7)
    for completion, number in zip(drawn, numbers[:, 0].tolist(), strict=True):
        token = completion.token_ids[0]
        assert float(below[token]) > number
        assert token == 0 or float(below[token - 1]) <= number


def test_draws_follow_the_distribution(policy: Any, bpe_tokenizer: Any) -> None:
    [prompt] = prompt_ids(bpe_tokenizer)[:1]
    with torch.no_grad():
        probabilities = torch.softmax(policy(torch.tensor([prompt])).logits[0, -1], -1)
    n = 2000
    drawn = sample(policy, bpe_tokenizer, [prompt] * n, uniforms(0, 0, range(n), 1), max_rows=n)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=300)
    likely = probabilities > 0.01
    error = (counts[likely] / n - probabilities[likely]).abs()
    assert bool((error < 4 * (probabilities[likely] / n).sqrt()).all())


def test_a_row_draws_the_same_in_any_batch_and_step_by_step_others(policy: Any, bpe_tokenizer: Any) -> None:
    prompts = prompt_ids(bpe_tokenizer)
    whole = sample(policy, bpe_tokenizer, prompts, uniforms(5, 2, range(4), 8))
    assert sample(policy, bpe_tokenizer, prompts, uniforms(5, 2, range(4), 8), max_rows=1) == whole
    assert sample(policy, bpe_tokenizer, prompts[2:], uniforms(5, 2, range(2, 4), 8)) == whole[2:]
    assert sample(policy, bpe_tokenizer, prompts, uniforms(5, 3, range(4), 8)) != whole


def test_the_global_generator_is_not_touched(policy: Any, bpe_tokenizer: Any) -> None:
    before = torch.get_rng_state()
    sample(policy, bpe_tokenizer, prompt_ids(bpe_tokenizer), uniforms(0, 0, range(4), 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_ends_a_completion(bpe_tokenizer: Any) -> None:
    stop, ends = ["\n\nHuman:"], frozenset({1})

    def ids(text: str) -> list[int]:
        return list(bpe_tokenizer.encode(text, add_special_tokens=False))

    paris = ids(" Paris.")
    # EOS is a token of the completion, what follows is padding.
    done = as_sampled(bpe_tokenizer, [*paris, 1, 2, 2], ends, stop)
    assert (done.token_ids, done.text, done.ended) == ((*paris, 1), "Paris.", True)
    # No end: all tokens, and not ended.
    cut = as_sampled(bpe_tokenizer, paris, ends, stop)
    assert (cut.token_ids, cut.text, cut.ended) == (tuple(paris), "Paris.", False)
    # A stop string: its tokens stay, as they are what the policy did; the text and what follows do not, EOS or not.
    opened = (*paris, *ids("\n\nHuman:"))
    for tail in ([], [1, 2]):
        turned = as_sampled(bpe_tokenizer, [*paris, *ids("\n\nHuman: and"), *tail], ends, stop)
        assert (turned.token_ids, turned.text, turned.ended) == (opened, "Paris.", False)
    # An answer that is nothing but the next turn.
    empty = as_sampled(bpe_tokenizer, ids("\n\nHuman: and"), ends, stop)
    assert (empty.token_ids, empty.text, empty.ended) == (opened[len(paris) :], "", False)


def test_generation_ends_at_a_stop_string(policy: Any, bpe_tokenizer: Any) -> None:
    prompts, numbers = prompt_ids(bpe_tokenizer), uniforms(5, 2, range(4), 24)
    free = sample(policy, bpe_tokenizer, prompts, numbers)
    inner = free[0].text[3:5]
    stopped = sample(policy, bpe_tokenizer, prompts, numbers, stop=[inner])
    assert free[0].text.startswith(stopped[0].text)
    assert len(stopped[0].text) < len(free[0].text)
    assert inner not in stopped[0].text
    assert not stopped[0].ended


# --- log-probabilities ---


@pytest.mark.parametrize(
    "name", ["llama-gqa", "llama-tied", "gpt2", "mistral-window", "gemma3", "qwen2", "gpt-neox", "opt", "bloom"]
)
def test_logprobs_and_values_are_right_under_any_padding(
    name: str, tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any
) -> None:
    policy = load_policy(find_checkpoint(str(tiny_checkpoint(name))), "cpu")
    prompts = prompt_ids(bpe_tokenizer)
    completions = [(5, 6, 7, 1), (9,), (8, 8, 8, 8, 8, 8, 1), (20, 21)]
    batch = collate(prompts, completions, bpe_tokenizer, widths=(40, 9))
    assert batch.completion_mask.sum(-1).tolist() == [4, 1, 7, 2]
    value = ValueModel(policy.base_model, torch.ones(1, policy.config.get_text_config().hidden_size))
    with torch.no_grad():
        logits = completion_logits(policy, batch.input_ids, batch.attention_mask, 9, 0.7)
        together = completion_logprobs(policy, batch.input_ids, batch.attention_mask, 9, 0.7)
        spread = entropy(logits)
        values = completion_values(value, batch.input_ids, batch.attention_mask, 9)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids, n = torch.tensor([[*prompt, *completion]]), len(completion)
            plain = torch.log_softmax(policy(ids).logits[0, -n - 1 : -1] / 0.7, -1)  # (n, V)
            alone = plain.gather(-1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(together[row, :n], alone, atol=2e-5, rtol=0)
            torch.testing.assert_close(spread[row, :n], -(plain.exp() * plain).sum(-1), atol=2e-5, rtol=0)
            states = policy.base_model(ids).last_hidden_state[0, -n - 1 : -1].sum(-1)
            torch.testing.assert_close(values[row, :n], states, atol=2e-4, rtol=1e-4)


def test_training_mode_without_dropout_is_evaluation(tiny_checkpoint: Callable[[str], Path]) -> None:
    for name in ("gpt2", "opt", "llama-gqa"):
        policy = load_policy(find_checkpoint(str(tiny_checkpoint(name))), "cpu")
        ids = torch.arange(3, 30)[None]
        with torch.no_grad():
            quiet = policy.eval()(ids).logits
            assert torch.equal(policy.train()(ids).logits, quiet)


# --- the value model ---


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: Any) -> Path:
    folder = build_checkpoint(tmp_path_factory.mktemp("reward") / "model", hidden_size=32, layers=2, reward=True)
    (folder / "tokenizer.json").unlink()
    bpe_tokenizer.save_pretrained(folder)
    return folder


def test_the_value_at_the_end_is_the_reward(
    reward_folder: Path, tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any
) -> None:
    checkpoint = find_checkpoint(str(tiny_checkpoint("llama-gqa")))
    reward = HFRewardModel(str(reward_folder), device="cpu")
    value, origin = load_value_model(reward, checkpoint, bpe_tokenizer, "cpu")
    assert origin == "reward model"
    talk = conversation((Message("user", "Hello"),), "there")
    ids = torch.tensor(reward.encode([talk]))
    with torch.no_grad():
        assert float(value(ids, torch.ones_like(ids))[0, -1]) == pytest.approx(reward.score([talk])[0], abs=1e-5)
        head = rescaled({name: {"weights": p} for name, p in value.named_parameters()}, 2.0, 4.0)  # (r - 2) / 4
        for name, state in head.items():
            value.get_parameter(name).copy_(state["weights"])
        predicted = float(value(ids, torch.ones_like(ids))[0, -1])
    assert predicted == pytest.approx((reward.score([talk])[0] - 2) / 4, abs=1e-5)


def test_training_the_value_model_leaves_the_reward_model_alone(
    reward_folder: Path, tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any
) -> None:
    reward = HFRewardModel(str(reward_folder), device="cpu")
    value, _ = load_value_model(reward, find_checkpoint(str(tiny_checkpoint("llama-gqa"))), bpe_tokenizer, "cpu")
    before = reward.score([conversation((Message("user", "Hello"),), "there")])
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.add_(1.0)
    assert reward.score([conversation((Message("user", "Hello"),), "there")]) == before


def test_with_another_tokenizer_the_values_begin_at_0_on_the_policy(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any
) -> None:
    other = build_checkpoint(tmp_path / "other", hidden_size=32, layers=1, vocab_size=320, reward=True)
    checkpoint = find_checkpoint(str(tiny_checkpoint("llama-gqa")))
    value, origin = load_value_model(HFRewardModel(str(other), device="cpu"), checkpoint, bpe_tokenizer, "cpu")
    assert origin == "policy, head at zero: the reward model has another tokenizer"
    ids = torch.arange(3, 20)[None]
    assert not value(ids, torch.ones_like(ids)).any()
    assert json.loads((checkpoint.path / "config.json").read_text())["hidden_size"] == value.head.in_features


def test_a_reward_model_that_reads_both_ways_gives_no_values(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any
) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_labels = 1
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    bpe_tokenizer.save_pretrained(tmp_path)
    checkpoint = find_checkpoint(str(tiny_checkpoint("llama-gqa")))
    _, origin = load_value_model(HFRewardModel(str(tmp_path), device="cpu"), checkpoint, bpe_tokenizer, "cpu")
    assert origin.startswith("policy, head at zero: the reward model's head")


@pytest.mark.parametrize("more", ["reward", "policy"])
def test_a_token_that_one_side_has_added_costs_no_value_model(
    more: str, reward_folder: Path, tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any, tmp_path: Path
) -> None:
    added = copy.deepcopy(bpe_tokenizer)
    added.add_special_tokens({"additional_special_tokens": ["<|one-more|>"]})
    shutil.copytree(reward_folder, tmp_path / "reward")
    (added if more == "reward" else bpe_tokenizer).save_pretrained(tmp_path / "reward")
    policy = added if more == "policy" else bpe_tokenizer
    checkpoint = find_checkpoint(str(tiny_checkpoint("llama-gqa")))
    reward = HFRewardModel(str(tmp_path / "reward"), device="cpu")
    value, origin = load_value_model(reward, checkpoint, policy, "cpu")
    assert origin == "reward model"
    ids = torch.tensor([[0, 5, len(policy) - 1]])  # the new token has a row
    assert value(ids, torch.ones_like(ids)).isfinite().all()
