"""Which prompts are to be continued together: those that begin alike, where that saves more than a batch costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from almost_eval.engines.prefix import common_prefix_length

STEP = 16
"""Tokens of a prompt that are read at the cost of a step of one more batch, which reads all weights for a few rows."""


@dataclass(frozen=True, slots=True)
class HeaderGroup:
    """Prompts that one batch, or several in turn, continue behind one header."""

    prompts: tuple[int, ...]
    """Indices, the longest prompt first."""
    shared: int
    """Tokens that all of them begin with. A token of each is left to go on from."""


def header_groups(prompts: Sequence[NDArray[np.int32]], new_tokens: int) -> list[HeaderGroup]:
    """Divide prompts (token ids) into groups, those with neighbouring texts side by side.

    All prompts stay in one group unless some of them share so much more that reading it once saves more tokens than
    the steps of one batch more (`STEP` x `new_tokens`) cost.
    """
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].astype(">u4").tobytes(), i))
    groups: list[HeaderGroup] = []
    # A stack of branches, from the root to the prompt before: tokens they share, and prompts not in a group yet.
    branches: list[tuple[int, list[int]]] = [(0, [])]

    def close(down_to: int) -> None:
        """Close the branches that share more than `down_to` tokens; each is a group, or passed on to the one below."""
        while branches[-1][0] > down_to:
            shared, members = branches.pop()
            below = max(down_to, branches[-1][0])
            if (shared - below) * (len(members) - 1) > STEP * new_tokens:
                groups.append(_group(prompts, members))
                members = []
            if branches[-1][0] < below:
                branches.append((below, members))
            else:
                branches[-1][1].extend(members)

    before = None
    for index in order:
        if before is not None:
            close(common_prefix_length(prompts[before], prompts[index]))
        if branches[-1][0] < len(prompts[index]):
            branches.append((len(prompts[index]), []))
        branches[-1][1].append(index)
        before = index
    close(0)
    if branches[0][1]:
        groups.append(_group(prompts, branches[0][1]))
    return groups


def _group(prompts: Sequence[NDArray[np.int32]], members: list[int]) -> HeaderGroup:
    first = prompts[members[0]]
    shared = min(common_prefix_length(first, prompts[i]) for i in members)
    shared = min(shared, *(len(prompts[i]) - 1 for i in members), len(first) - 1)
    return HeaderGroup(tuple(sorted(members, key=lambda i: (-len(prompts[i]), i))), shared)
