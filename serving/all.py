"""`almost-serve all`: policy, reward model and gateway as one."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import IO

from almost_eval.errors import InputError
from serving.gateway.settings import KEY, POLICY_KEY, REWARD_KEY, GatewayLimits, GatewaySettings, flag_of
from serving.launch.process import ServerProcess, check_port, free_port
from serving.launch.supervisor import run_servers
from serving.vllm.launch import VLLMServer, runs_on_cpu

_CONSENTS = ("--allow-pickle", "--trust-remote-code", "--allow-unused-weights")
_GPU_SHARES = {"policy": "0.6", "reward": "0.3"}
"""Shares of a GPU's memory where both models live on one; vLLM's default is 0.9 for each."""


def serve_everything(
    *,
    model: str,
    reward_model: str,
    host: str,
    port: int,
    policy_options: str,
    reward_options: str,
    start_timeout: float,
    dry_run: bool,
    log: IO[str] | None,
    limits: GatewayLimits,
    allowed_hosts: Sequence[str] = (),
    open_metrics: bool = False,
    allow_unused_weights: bool = False,
) -> None:
    """Serve until a signal comes or one of the three ends.

    The two vLLM servers listen on free ports of 127.0.0.1 and have a random key each, which only the gateway knows.

    Args:
        model: the policy's checkpoint.
        reward_model: the reward model's.
        host: the gateway's address.
        port: the gateway's port; 0 takes a free one.
        policy_options: vLLM's options for the policy, in one string.
        reward_options: vLLM's options for the reward model, in one string.
        start_timeout: seconds that the start may take.
        dry_run: print the three commands and return.
        log: takes the servers' output.
        limits: the gateway's.
        allowed_hosts: names that the gateway answers to besides its own, and sites whose pages may ask it.
        open_metrics: the gateway's `/metrics` needs no key.
        allow_unused_weights: tensors in the files that a model does not take are accepted.

    Raises:
        InputError: wrong options, a port in use, too little memory, a checkpoint that cannot be served.
        RunError: one of the three ended; the others were stopped.
    """
    check_port(host, port)
    # Checks the keys and the names, before any start.
    GatewaySettings(policy_url="http://127.0.0.1:1", host=host, port=port, allowed_hosts=tuple(allowed_hosts))
    keys = {POLICY_KEY: secrets.token_urlsafe(24), REWARD_KEY: secrets.token_urlsafe(24)}
    model_server = partial(_model_server, log=log, allow_unused_weights=allow_unused_weights)
    policy = model_server("policy", model, policy_options, keys[POLICY_KEY], 0.0)
    taken = policy.vllm.needed_bytes
    reward = model_server("reward", reward_model, reward_options, keys[REWARD_KEY], taken)
    port = port or free_port(host)
    command = _gateway_command(policy, reward, reward_model, host, port, limits)
    command += [text for name in allowed_hosts for text in ("--allowed-host", name)]
    command += ["--open-metrics"] if open_metrics else []
    gateway = ServerProcess("gateway", command, (host, port), environment=keys, log=log)
    if dry_run:
        for server in (policy, reward):
            print(server.vllm.shown("'(random)'"))
        print(shlex.join(gateway.command))
        return
    if policy.vllm.note:
        print(policy.vllm.note, file=sys.stderr)
    for server in (policy, reward):
        if server.served.warning:
            print(f"warning: {server.name}: {server.served.warning}", file=sys.stderr)

    def ready() -> None:
        names = f"{policy.model}, with best_of by {reward.model}"
        print(f"{gateway.url}/v1 serves {names}; ready after {policy.age_s:.0f} s")
        print(_example(gateway.url, policy.model), flush=True)

    # On a GPU, vLLM measures free memory as it starts, which must not move meanwhile.
    run_servers([policy, reward, gateway], ready, in_turn=not runs_on_cpu(), timeout_s=start_timeout)


def _model_server(
    kind: str,
    model: str,
    text: str,
    key: str,
    reserved_bytes: float,
    *,
    log: IO[str] | None,
    allow_unused_weights: bool,
) -> VLLMServer:
    try:
        options: Sequence[str] = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--{kind}-options {text!r} is not a list of options: {error}") from None
    if not runs_on_cpu() and not any("gpu" in option for option in options):
        options = [*options, "--gpu-memory-utilization", _GPU_SHARES[kind]]
    # These three are the toolkit's own as well: what it checks before vLLM starts must allow the same.
    own = {flag for flag in _CONSENTS if flag in options}
    return VLLMServer(
        kind,
        model,
        options=[option for option in options if option not in own],
        api_key=key,
        reserved_bytes=reserved_bytes,
        allow_pickle="--allow-pickle" in own,
        trust_remote_code="--trust-remote-code" in own,
        allow_unused_weights=allow_unused_weights or "--allow-unused-weights" in own,
        log=log,
    )


def _gateway_command(
    policy: VLLMServer, reward: VLLMServer, reward_model: str, host: str, port: int, limits: GatewayLimits
) -> list[str]:
    # With the checkpoint at hand the gateway renders, and all candidates are scored in one request.
    addresses = {"policy_url": policy.url, "reward_url": reward.url, "reward_model": reward_model}
    values = {**addresses, "host": host, "port": port, **asdict(limits)}
    del values["max_conversations"]  # has no flag
    flags = [text for name, value in values.items() for text in (flag_of(name), str(value))]
    return [sys.executable, "-m", "serving.cli", "gateway", *flags]


def _example(url: str, model: str) -> str:
    key = ' -H "Authorization: Bearer $ALMOST_API_KEY"' if os.environ.get(KEY) else ""
    return (
        f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What does the otter eat?"}}], """
        """"best_of": 8}'"""
    )
