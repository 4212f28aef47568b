"""Which texts a reward model reads in one forward pass.

A pass holds texts of similar length, so that little of it is padding. The answers of a sample differ in length, though,
and in a run whose batches are cut from one list by length they are in distant passes: a process that has a part of the
samples would compute passes of which it needs one text. So a run is cut into blocks of whole samples first, the longest
samples first, and a block into passes by length. A block is a few passes long: shorter ones would be padded more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

BLOCK_PASSES = 2
"""Passes of a block. On Static HHH all passes together hold 2 to 3 % more positions than without blocks."""


def first_samples(owners: Iterable[Sequence[int]]) -> list[int]:
    """Text (given by its samples) -> a number, the same for all samples that share a text, directly or by others."""
    above: dict[int, int] = {}

    def first(sample: int) -> int:
        while (upper := above.setdefault(sample, sample)) != sample:
            above[sample] = above[upper]
            sample = upper
        return sample

    kept = list(owners)
    for own in kept:
        for sample in own:
            above[first(sample)] = first(own[0])
    return [first(own[0]) for own in kept]


def text_blocks(lengths: Sequence[int], samples: Sequence[int] | None, tokens: int) -> list[list[int]]:
    """Texts in blocks, each with the longest first; the order of the texts breaks ties.

    Args:
        lengths: tokens of each text, all above 0.
        samples: the sample that each belongs to; None makes one block of all texts.
        tokens: positions of a forward pass.
    """
    if samples is None:
        blocks = [list(range(len(lengths)))]
    else:
        texts: dict[int, list[int]] = {}
        for text, sample in enumerate(samples):
            texts.setdefault(sample, []).append(text)
        order = sorted(texts.values(), key=lambda own: (-max(lengths[t] for t in own), own))
        blocks, size = [[]], 0
        for own in order:
            more = sum(lengths[text] for text in own)
            if blocks[-1] and size + more > BLOCK_PASSES * tokens:
                blocks.append([])
                size = 0
            blocks[-1] += own
            size += more
    return [sorted(block, key=lambda text: (-lengths[text], text)) for block in blocks]


def pass_count(longest: int, tokens: int, rows: int) -> int:
    """How many texts a pass holds that begins with one of `longest` tokens."""
    return max(1, min(tokens // longest, rows))


def passes(lengths: Sequence[int], block: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """The passes of a block, where memory suffices for each."""
    at = 0
    while at < len(block):
        count = pass_count(lengths[block[at]], tokens, rows)
        yield list(block[at : at + count])
        at += count
