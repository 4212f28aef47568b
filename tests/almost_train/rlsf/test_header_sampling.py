"""Prompts that begin alike are read once, and the text stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from almost_eval.models.checkpoint import find_checkpoint
from almost_train.common.lora import LoraSettings, add_lora
from almost_train.rlsf import header_sampling, rollouts
from almost_train.rlsf.models import load_policy
from almost_train.rlsf.rollouts import Sampled, sample, uniforms

pytestmark = pytest.mark.usefixtures("one_thread")

HEADER = tuple(range(10, 70))
PROMPTS = [(*HEADER, *tail) for tail in [(70, 71, 72), (80,), (90, 91), (80,)]]
NEW = 24


def tokens_read(model: Any) -> list[int]:
    """Sizes of what the model reads from now on, padding included."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return sizes


def drawn(model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], **options: Any) -> list[Sampled]:
    return sample(model, tokenizer, prompts, uniforms(3, 1, range(len(prompts)), NEW), temperature=0.9, **options)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("max_rows", [64, 3])
def test_the_text_is_the_same_and_the_header_is_read_once(
    name: str, max_rows: int, tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any, monkeypatch: Any
) -> None:
    model = load_policy(find_checkpoint(str(tiny_checkpoint(name))), "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "sample_behind_headers", lambda *_, **__: {})
        apart = drawn(model, bpe_tokenizer, PROMPTS, stop=("\n\nHuman:",), max_rows=max_rows)
    sizes = tokens_read(model)
    together = drawn(model, bpe_tokenizer, PROMPTS, stop=("\n\nHuman:",), max_rows=max_rows)
    assert together == apart
    # The header once, what follows it, and a token of each row in each step.
    assert sizes[0] == len(HEADER)
    assert max(sizes[1:]) <= 3 * len(PROMPTS)


def test_prompts_that_share_nothing_take_the_old_way(
    tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any, monkeypatch: Any
) -> None:
    model = load_policy(find_checkpoint(str(tiny_checkpoint("llama-gqa"))), "cpu")
    monkeypatch.setattr(header_sampling, "continue_rows", lambda *_: pytest.fail("nothing is shared"))
    assert len(drawn(model, bpe_tokenizer, [(5, 6, 7), (8, 9)])) == 2


def test_a_policy_with_an_adapter(
    tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    base = load_policy(find_checkpoint(str(tiny_checkpoint("llama-gqa"))), "cpu")
    model = add_lora(base, LoraSettings(lora_rank=2), tmp_path, kind="CAUSAL_LM", seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.1)
    together = drawn(model, bpe_tokenizer, PROMPTS)
    monkeypatch.setattr(rollouts, "sample_behind_headers", lambda *_, **__: {})
    assert drawn(model, bpe_tokenizer, PROMPTS) == together
    with model.disable_adapter():
        assert drawn(model, bpe_tokenizer, PROMPTS) != together


def test_a_model_that_attends_in_its_own_way_takes_the_old_way(
    tiny_checkpoint: Callable[[str], Path], bpe_tokenizer: Any, monkeypatch: Any
) -> None:
    model = load_policy(find_checkpoint(str(tiny_checkpoint("llama-gqa"))), "cpu")
    together = drawn(model, bpe_tokenizer, PROMPTS)

    def fails_after_two(*arguments: Any) -> Any:
        rows = continue_rows(*arguments)
        yield next(rows)
        yield next(rows)
        raise ValueError("foreign")

    continue_rows = header_sampling.continue_rows
    monkeypatch.setattr(header_sampling, "continue_rows", fails_after_two)
    assert drawn(model, bpe_tokenizer, PROMPTS) == together
