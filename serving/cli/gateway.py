"""`almost-serve gateway`."""

from __future__ import annotations

from typing import Any

import click

from almost_eval.cli.command_line import Command, options
from serving.gateway.settings import KEY, POLICY_KEY, REWARD_KEY, GatewaySettings, flag_of

_DEFAULTS = GatewaySettings(policy_url="http://127.0.0.1:8001", api_key=None, policy_key=None, reward_key=None)

LIMIT_HELP = {
    "max_best_of": "Largest N.",
    "max_sequences": "Answers that one request may ask for: prompts times n.",
    "max_body_bytes": "Longest request.",
    "max_concurrent": "Requests at work at a time; those beyond get 429.",
    "body_timeout_s": "Seconds from a request's headers to the end of its body.",
    "timeout_s": "Seconds from a request's arrival to the last byte of its answer.",
    "reward_timeout_s": "Seconds that the reward model has for one request.",
}


def _limit(name: str, text: str) -> Command:
    default = getattr(_DEFAULTS, name)
    return click.option(flag_of(name), name, type=type(default), default=default, show_default=True, help=text)


LIMITS = [_limit(name, text) for name, text in LIMIT_HELP.items()]
"""The options that say what the gateway lets in; `almost-serve all` has them too."""

ALLOWED_HOST = click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="HOST",
    help="A further name to answer to, and a site whose pages may ask; may be repeated; * for any.",
)
OPEN_METRICS = click.option("--open-metrics", is_flag=True, help="Answer /metrics without the key.")
DOOR: list[Command] = [ALLOWED_HOST, OPEN_METRICS]
"""The options of every server that say whom it answers."""


@click.command()
@click.option("--policy-url", required=True, help="The policy's server, as in http://127.0.0.1:8001.")
@click.option("--reward-url", help="The reward model's server; without it there is no best-of-N.")
@click.option(
    "--reward-model",
    help="Its checkpoint: all candidates of a request are then scored in one, which is faster.",
)
@click.option("--host", default=_DEFAULTS.host, show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=_DEFAULTS.port, show_default=True, help="0 takes a free one.")
@options(DOOR, LIMITS)
def gateway(**values: Any) -> None:
    """An OpenAI-compatible endpoint before both servers, with best-of-N."""
    settings = GatewaySettings(**values)
    from serving.gateway.app import run

    run(settings)


gateway.epilog = (
    f"Keys come from the environment: {KEY} is what clients must send, {POLICY_KEY} and {REWARD_KEY} what the gateway "
    "sends to the two servers."
)
