"""The passes of a reward model: each text once, and a part of the samples costs a part of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from almost_eval.nano import shipped
from almost_eval.rewards.batches import BLOCK_PASSES, passes, text_blocks
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Conversation, Message

SAMPLES = 40


def conversations() -> tuple[list[Conversation], list[int]]:
    """Two answers of quite different length for each sample, and one that two samples share."""
    rng = random.Random(0)
    words = "the panther has a huge body and it is small".split()
    texts = [
        (Message("user", f"How big is panther {sample}?"), Message("assistant", " ".join(rng.choices(words, k=count))))
        for sample in range(SAMPLES)
        for count in (rng.randint(1, 8), rng.randint(9, 60))
    ]
    return [*texts, texts[0]], [*(at // 2 for at in range(2 * SAMPLES)), SAMPLES]


def test_blocks_hold_whole_samples_and_passes_fit() -> None:
    rng = random.Random(1)
    samples = [at // 2 for at in range(400)]
    lengths = [rng.randint(5, 300) for _ in samples]
    blocks = text_blocks(lengths, samples, 512)
    assert sorted(text for block in blocks for text in block) == list(range(400))
    of_sample = [{samples[text] for text in block} for block in blocks]
    assert sum(map(len, of_sample)) == 200  # none is in two
    assert all(sum(lengths[text] for text in block) <= BLOCK_PASSES * 512 for block in blocks)
    cut = [batch for block in blocks for batch in passes(lengths, block, 512, 1000)]
    assert [text for batch in cut for text in batch] == [text for block in blocks for text in block]
    for batch in cut:
        assert len(batch) * max(lengths[text] for text in batch) <= 512
        assert lengths[batch[0]] == max(lengths[text] for text in batch)
    assert len(text_blocks(lengths, None, 512)) == 1


@pytest.mark.parametrize("parts", [2, 4])
def test_a_part_computes_what_its_plan_says(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    model = HFRewardModel(str(shipped("nano/reward")), dtype="float32", batch_tokens=256)
    texts, sample_of = conversations()
    whole = dict(model.stream(texts, None, sample_of))
    forward, computed = model._forward, []

    def counted(batch: Sequence[Any]) -> list[float]:
        computed.append(len(batch) * max(map(len, batch)))
        return forward(batch)

    monkeypatch.setattr(model, "_forward", counted)
    partition = model.partition(texts, sample_of, SAMPLES + 2, parts)
    assert sorted(sample for part in partition.parts for sample in part) == list(range(SAMPLES + 2))
    for part, tokens in zip(partition.parts, partition.tokens, strict=True):
        computed.clear()
        wanted = [at for at, sample in enumerate(sample_of) if sample in part]
        assert dict(model.stream(texts, wanted, sample_of)) == {at: whole[at] for at in wanted}  # bit by bit
        assert sum(computed) == tokens
    assert partition.extra <= 0.05
