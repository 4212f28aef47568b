"""What the server of models is started with. Quick to import: its parent reads this, and loads no model."""

from __future__ import annotations

from dataclasses import dataclass

KEY = "ALMOST_LOCAL_KEY"
"""Environment variable of the key that the parent made for its child: no other program of this machine has it."""
MAX_BEST_OF = 16


@dataclass(frozen=True, slots=True)
class LocalModels:
    """The models of one server."""

    policies: dict[str, str]
    """Served name -> checkpoint; the first answers a request that names none."""
    reward: str | None = None
    """The reward model's checkpoint."""
    dtype: str = "auto"
    device: str = "auto"
