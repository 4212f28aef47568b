"""Evaluate language models aligned by synthetic feedback (ALMoST, arXiv 2305.13735).

Five names are all that most programs need: `evaluate`, `compare`, `load_run`, `HFEngine` and `RewardModel`. They are
imported when they are first asked for, so importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from almost_eval.api import HFEngine, RewardModel, compare, evaluate, load_run

__version__ = "0.3.0"
__all__ = ["HFEngine", "RewardModel", "compare", "evaluate", "load_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from almost_eval import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
