"""Models in processes of their own: they load while the page is being imported, and a crash of one is a sentence."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from almost_eval.errors import InputError, RunError
from serving.chat.client import Endpoint
from serving.launch.process import ServerProcess, free_port

_LOCAL_KEY = (
    "ALMOST_LOCAL_KEY"  # serving.local.server.KEY and serving.gateway.settings.KEY: those modules load too much
)
_GATEWAY_KEY = "ALMOST_API_KEY"
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
        self.names = tuple(names)
        self._key = secrets.token_urlsafe(32)
        self._ready = ready
        super().__init__(
            " and ".join(names),
            [sys.executable, "-m", *command, "--port", str(port)],
            ("127.0.0.1", port),
            environment={variable: self._key},
        )

    def endpoint(self) -> Endpoint:
        """Where it answers."""
        return Endpoint(f"{self.url}/v1", self._key, local=True)

    def is_healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether the models answer now."""
        import urllib.request

        request = urllib.request.Request(self.url + self._ready, headers={"Authorization": f"Bearer {self._key}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):  # HTTPError is an OSError
            return False

    def failure(self) -> RunError | InputError:
        """The line that the child itself ended with, where there is one."""
        told = super().failure()  # waits for the last lines
        words = next((line for line in reversed(self.last_lines()) if line.startswith(_ERROR)), None)
        if words is None:
            return told
        kind = InputError if self.exit_code == InputError.exit_code else RunError
        return kind(words.removeprefix(_ERROR))


def with_transformers(models: Sequence[str], reward: str | None, options: Mapping[str, Any]) -> Models:
    """All models in one process (`serving.local.server`).

    Args:
        models: checkpoints, each served under the name it is given as.
        reward: the reward model, or None.
        options: of `HFEngine` and `HFRewardModel`.
    """
    asked = json.dumps({"policies": list(models), "reward": reward, "options": dict(options)})
    return Models(models, ["serving.local.server", asked], _LOCAL_KEY)


def with_vllm(model: str, reward: str | None) -> Models:
    """One model, with vLLM: `almost-serve all`, or `almost-serve policy` without a reward model."""
    if reward:
        return Models([model], ["serving.cli", "all", "--model", model, "--reward", reward], _GATEWAY_KEY)
    return Models([model], ["serving.cli", "policy", "--model", model], _GATEWAY_KEY, "/health")
