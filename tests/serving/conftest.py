"""Real servers, started once per session by the launcher that users have: each takes some 20 seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.vllm.launch import VLLMServer

START_S = 300.0


def _serving(kind: str, checkpoint: str) -> Iterator[VLLMServer]:
    pytest.importorskip("vllm", reason="serving needs vLLM: pip install 'almost-toolkit[vllm]'")
    with VLLMServer(kind, checkpoint) as server:
        server.wait_ready(timeout_s=START_S)
        yield server


@pytest.fixture(scope="session")
def policy_server() -> Iterator[VLLMServer]:
    """`nano/almost` on vLLM's OpenAI server: `.url`, `.model`, `.pid`."""
    yield from _serving("policy", "nano/almost")


@pytest.fixture(scope="session")
def reward_server() -> Iterator[VLLMServer]:
    """`nano/reward` on vLLM's pooling server: `.url`, `.model`, `.pid`."""
    yield from _serving("reward", "nano/reward")
