"""Seeds for engines that draw by themselves."""

from __future__ import annotations

import hashlib
import json


def request_seed(seed: int, prompt: str, number: int) -> int:
    """A seed of each completion's own, below 2**31 so that every server takes it.

    Made from the prompt and never from its place in a list: handing in what is missing after a kill draws the same.

    >>> request_seed(0, "Human: hello", 1) == request_seed(0, "Human: hello", 1)
    True
    """
    key = json.dumps([seed, prompt, number]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "little") >> 1
