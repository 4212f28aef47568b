"""Starts models in processes of their own, which load while the page is imported. If one fails, its last line says
why.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from almost_eval.errors import InputError, RunError
from serving.chat.client import Endpoint
from serving.gateway.settings import KEY
from serving.launch.process import ServerProcess, free_port
from serving.local.settings import KEY as LOCAL_KEY
from serving.local.settings import LocalModels

_ERROR = "error: "


class Models(ServerProcess):
    """A child process with models and the gateway before them; a context manager, as every `ServerProcess`.

    Args:
        names: the models it serves.
        command: without the port.
        variable: the environment variable that its key goes into.
        ready: the path that answers 200 once the models do; a gateway's `/health` speaks of itself alone.
    """

    def __init__(self, names: Sequence[str], command: Sequence[str], variable: str, ready: str = "/ready") -> None:
        port = free_port()
        key = secrets.token_urlsafe(32)
        self.names = tuple(names)
        super().__init__(
            " and ".join(names),
            [sys.executable, "-m", *command, "--port", str(port)],
            ("127.0.0.1", port),
            environment={variable: key},
            health=ready,
            key=key,
        )

    def endpoint(self) -> Endpoint:
        """Where it answers."""
        return Endpoint(f"{self.url}/v1", self._key, local=True)

    def failure(self) -> RunError | InputError:
        """The line that the child itself ended with, where there is one."""
        told = super().failure()  # waits for the last lines
        words = next((line for line in reversed(self.last_lines()) if line.startswith(_ERROR)), None)
        if words is None:
            return told
        kind = InputError if self.exit_code == InputError.exit_code else RunError
        return kind(words.removeprefix(_ERROR))


def with_transformers(
    models: Mapping[str, str], reward: str | None, *, dtype: str = "auto", device: str = "auto"
) -> Models:
    """All models in one process (`serving.local`).

    Args:
        models: served name -> checkpoint.
        reward: the reward model, or None.
        dtype: of `HFEngine` and `HFRewardModel`.
        device: of both, too.
    """
    settings = LocalModels(dict(models), reward, dtype, device)
    return Models(list(settings.policies), ["serving.cli.local", json.dumps(asdict(settings))], LOCAL_KEY)


def with_vllm(name: str, model: str, reward: str | None) -> Models:
    """One model, with vLLM: `almost-serve all`, or `almost-serve policy` without a reward model.

    Args:
        name: what the page calls it.
        model: checkpoint.
        reward: the reward model, or None.
    """
    names = [name]
    if reward:
        return Models(names, ["serving.cli", "all", "--model", model, "--reward", reward], KEY)
    return Models(names, ["serving.cli", "policy", "--model", model], KEY, "/health")
