"""What `almost-chat` is started with. Quick to import: the command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BEFORE, AFTER = "nano/vanilla-large", "nano/almost"
"""The built-in model before and after its alignment, which the page opens with where both are served."""
DEFAULT_MODELS = (AFTER, "nano/sft", BEFORE)
"""The models of an `almost-chat` without `--model` and `--base-url`."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The flags of `almost-chat`, each under its own name, and the login of the environment."""

    urls: tuple[str, ...] = ()
    """`[NAME=]URL[#MODEL]` of OpenAI-compatible endpoints."""
    models: tuple[str, ...] = ()
    """Checkpoints to load on this machine."""
    reward: str | None = None
    """Reward model for `models`; None: nano/reward where all of them are built in, else none."""
    engine: str = "hf"
    """`hf` or `vllm`: what runs `models`."""
    dtype: str = "auto"
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 7860
    """0 takes a free one."""
    votes: Path = Path("runs/arena.db")
    questions: Path | None = None
    """JSON lines; None: questions of the built-in world, or `EXAMPLES`."""
    reports: Path = Path("runs")
    rate: int = 30
    """Questions a minute for each visitor."""
    address_rate: int | None = None
    """Questions a minute for each address; None: as many as for a visitor."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides its own that the page is asked for by, and sites whose pages may ask it."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of proxies whose `X-Forwarded-For` says where a question comes from."""
    concurrency: int = 8
    """Answers at work at a time."""
    max_tokens: int = 256
    temperature: float = 0.7
    seed: int | None = None
    """Of the arena's shuffling; None draws one."""
    login: str | None = None
    """`user:password`, several of them on a line each; None lets everybody in."""
    conversations: Path = Path("runs/conversations.db")
    """Where conversations are kept if there is a login."""


def lines_of(login: str | None) -> list[str]:
    """Each `user:password` of a login."""
    return [line.strip() for line in (login or "").splitlines() if line.strip()]
