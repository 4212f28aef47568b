"""`almost-serve all`: policy, reward model and gateway as one."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from typing import IO, Any

import click

from almost_eval.errors import InputError
from serving.gateway.settings import KEY, POLICY_KEY, REWARD_KEY, GatewaySettings
from serving.launch.process import ServerProcess, check_port, free_port
from serving.launch.supervisor import run_servers
from serving.vllm.launch import VLLMServer, runs_on_cpu

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
    **limits: Any,
) -> None:
    """Serve until a signal comes or one of the three ends.

    The two vLLM servers listen on free ports of 127.0.0.1 and have a random key each, which only the gateway knows.

    Raises:
        InputError: wrong options, a port in use, too little memory, a checkpoint that cannot be served.
        RunError: one of the three ended; the others were stopped.
    """
    check_port(host, port)
    GatewaySettings(policy_url="http://127.0.0.1:1", host=host, port=port, **limits)  # its checks, before any start
    keys = {POLICY_KEY: secrets.token_urlsafe(24), REWARD_KEY: secrets.token_urlsafe(24)}
    policy = _model_server("policy", model, policy_options, keys[POLICY_KEY], log)
    reward = _model_server("reward", reward_model, reward_options, keys[REWARD_KEY], log, policy.vllm.needed_bytes)
    port = port or free_port(host)
    command = _gateway_command(policy, reward, reward_model, host, port, limits)
    gateway = ServerProcess("gateway", command, (host, port), environment=keys, log=log)
    if dry_run:
        for server in (policy, reward):
            click.echo(server.vllm.shown("'(random)'"))
        click.echo(shlex.join(gateway.command))
        return
    if policy.vllm.note:
        click.echo(policy.vllm.note, err=True)

    def ready() -> None:
        names = f"{policy.model}, with best_of by {reward.model}"
        click.echo(f"{gateway.url}/v1 serves {names}; ready after {policy.age_s:.0f} s")
        click.echo(_example(gateway.url, policy.model))
        sys.stdout.flush()

    # On a GPU, vLLM measures free memory as it starts, which must not move meanwhile.
    run_servers([policy, reward, gateway], ready, in_turn=not runs_on_cpu(), timeout_s=start_timeout)


def _model_server(
    kind: str, model: str, given: str, key: str, log: IO[str] | None, reserved_bytes: float = 0.0
) -> VLLMServer:
    try:
        options: Sequence[str] = shlex.split(given)
    except ValueError as error:
        raise InputError(f"--{kind}-options {given!r} is not a list of options: {error}") from None
    if not runs_on_cpu() and not any("gpu" in option for option in options):
        options = [*options, "--gpu-memory-utilization", _GPU_SHARES[kind]]
    return VLLMServer(kind, model, options=options, api_key=key, reserved_bytes=reserved_bytes, log=log)


def _gateway_command(
    policy: VLLMServer, reward: VLLMServer, reward_model: str, host: str, port: int, limits: dict[str, Any]
) -> list[str]:
    from serving.cli.gateway import gateway

    command = [
        sys.executable,
        "-m",
        "serving.cli",
        "gateway",
        "--policy-url",
        policy.url,
        "--reward-url",
        reward.url,
    ]
    # With the checkpoint at hand the gateway renders, and all candidates are scored in one request.
    command += ["--reward-model", reward_model, "--host", host, "--port", str(port)]
    flags = {parameter.name: parameter.opts[0] for parameter in gateway.params}
    for name, value in limits.items():
        command += [flags[name], str(value)]
    return command


def _example(url: str, model: str) -> str:
    key = ' -H "Authorization: Bearer $ALMOST_API_KEY"' if os.environ.get(KEY) else ""
    return (
        f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What does the otter eat?"}}], """
        """"best_of": 8}'"""
    )
