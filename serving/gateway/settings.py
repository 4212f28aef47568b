"""Addresses, keys and limits of the gateway. Quick to import: the command line reads the defaults for its help."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from almost_eval.errors import InputError
from almost_eval.models.endpoints import EndpointAddress
from serving.door.hosts import checked_hosts

KEY = "ALMOST_API_KEY"
POLICY_KEY = "ALMOST_POLICY_KEY"
REWARD_KEY = "ALMOST_REWARD_KEY"
_EXAMPLE = "http://127.0.0.1:8001"


def flag_of(name: str) -> str:
    """The command line's flag for a field of `GatewaySettings`: `timeout_s` -> `--timeout`."""
    return f"--{name.removesuffix('_s').replace('_', '-')}"


def _key(name: str) -> str | None:
    return os.environ.get(name) or None


@dataclass(frozen=True, kw_only=True)
class GatewayLimits:
    """How much the gateway takes, and how long that may last.

    Raises:
        InputError: a limit is out of range.
    """

    max_best_of: int = 16
    """The largest `best_of`, and the largest `n`."""
    max_conversations: int = 256
    """Conversations in one request to /v1/rewards."""
    max_sequences: int = 256
    """Answers that one request may ask the policy for: prompts times `n`."""
    max_body_bytes: int = 4 << 20
    max_concurrent: int = 256
    """Requests at work at a time; those beyond are refused with 429."""
    body_timeout_s: float = 30.0
    """Seconds from a request's headers to the end of its body."""
    timeout_s: float = 600.0
    """Seconds from a request's arrival to the last byte of its answer."""
    reward_timeout_s: float = 60.0
    """Seconds that the reward model may take for all candidates of one request."""

    def __post_init__(self) -> None:
        for name in ("max_best_of", "max_conversations", "max_sequences", "max_body_bytes", "max_concurrent"):
            if getattr(self, name) < 1:
                raise InputError(f"{flag_of(name)[2:]} must be 1 or more, not {getattr(self, name)}")
        for name in ("body_timeout_s", "timeout_s", "reward_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{flag_of(name)[2:]} must be above 0 seconds")


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(GatewayLimits):
    """Everything a gateway needs; the keys come from the environment and show in no repr.

    Raises:
        InputError: an address that is no http(s) address or holds a password; a key of more than one line; an
            allowed host that is none; a limit out of range.
    """

    policy_url: str
    """vLLM's OpenAI server, as in http://127.0.0.1:8001; a closing `/v1` is taken off."""
    reward_url: str | None = None
    """vLLM's pooling server with the reward model; None: no best-of-N and no /v1/rewards."""
    reward_model: str | None = None
    """The checkpoint behind `reward_url`; where it is told, all candidates are scored in one request."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides its own and the loopback's that clients may ask it by, and sites whose pages may; `*` for any."""
    open_metrics: bool = False
    """Whether /metrics needs no key."""
    api_key: str | None = field(default_factory=lambda: _key(KEY), repr=False)
    """What clients must send; None lets everybody in."""
    policy_key: str | None = field(default_factory=lambda: _key(POLICY_KEY), repr=False)
    """What the gateway sends to the policy server."""
    reward_key: str | None = field(default_factory=lambda: _key(REWARD_KEY), repr=False)
    """What the gateway sends to the reward server."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy_url", _address("--policy-url", self.policy_url))
        if self.reward_url is not None:
            object.__setattr__(self, "reward_url", _address("--reward-url", self.reward_url))
        for name, key in ((KEY, self.api_key), (POLICY_KEY, self.policy_key), (REWARD_KEY, self.reward_key)):
            if key is not None and any(character < " " or character == "\x7f" for character in key):
                raise InputError(f"{name} holds a line end or another control character: no header can carry it")
        super().__post_init__()
        object.__setattr__(self, "allowed_hosts", checked_hosts(self.allowed_hosts))
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be from 0 to 65535, not {self.port}")


def _address(flag: str, url: str) -> str:
    address = EndpointAddress.parse(url, flag, example=_EXAMPLE)
    if address.parts.query or address.parts.fragment:
        raise InputError(f"{flag} is not an http(s) address; it must look like {_EXAMPLE}")
    if address.has_user:
        raise InputError(f"{flag} holds a user or a password: keys come from {POLICY_KEY} and {REWARD_KEY} alone")
    return url.rstrip("/").removesuffix("/v1")
