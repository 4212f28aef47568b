"""`almost-serve gateway`."""

from __future__ import annotations

from typing import Any

import click

from serving.gateway.settings import KEY, POLICY_KEY, REWARD_KEY, GatewaySettings

_DEFAULTS = GatewaySettings(policy_url="http://127.0.0.1:8001", api_key=None, policy_key=None, reward_key=None)

LIMITS: list[Any] = [
    click.option("--max-best-of", type=int, default=_DEFAULTS.max_best_of, show_default=True, help="Largest N."),
    click.option(
        "--max-body-bytes", type=int, default=_DEFAULTS.max_body_bytes, show_default=True, help="Longest request."
    ),
    click.option(
        "--max-concurrent",
        type=int,
        default=_DEFAULTS.max_concurrent,
        show_default=True,
        help="Requests at work at a time; those beyond get 429.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=float,
        default=_DEFAULTS.timeout_s,
        show_default=True,
        help="Seconds from a request's arrival to the last byte of its answer.",
    ),
    click.option(
        "--reward-timeout",
        "reward_timeout_s",
        type=float,
        default=_DEFAULTS.reward_timeout_s,
        show_default=True,
        help="Seconds that the reward model has for one request.",
    ),
]
"""The options that say what the gateway lets in; `almost-serve all` has them too."""


def _with_limits(command: Any) -> Any:
    for option in reversed(LIMITS):
        command = option(command)
    return command


@click.command()
@click.option("--policy-url", required=True, help="The policy's server, as in http://127.0.0.1:8001.")
@click.option("--reward-url", help="The reward model's server; without it there is no best-of-N.")
@click.option(
    "--reward-model",
    help="Its checkpoint: all candidates of a request are then scored in one, which is faster.",
)
@click.option("--host", default=_DEFAULTS.host, show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=_DEFAULTS.port, show_default=True, help="0 takes a free one.")
@_with_limits
def gateway(**options: Any) -> None:
    """An OpenAI-compatible endpoint before both servers, with best-of-N."""
    settings = GatewaySettings(**options)
    from serving.gateway.app import run

    run(settings)


gateway.epilog = (
    f"Keys come from the environment: {KEY} is what clients must send, {POLICY_KEY} and {REWARD_KEY} what the gateway "
    "sends to the two servers."
)
