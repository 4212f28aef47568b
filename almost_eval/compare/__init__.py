"""What two or more runs say together: is B better than A, do engines agree, what did alignment cost. Uses `run`. Start
with `comparison`.

`almost_eval.compare(a, b)` is a function of the package, and this room bears its name: importing anything of the room
makes `almost_eval.compare` the module. So the module can be called, and both are the same to a program.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from almost_eval.compare.comparison import Comparison


class _CallableRoom(ModuleType):
    def __call__(self, run_a: object, run_b: object, *, seed: int = 0) -> Comparison:
        """See `almost_eval.api.compare`, which calls this."""
        from almost_eval.compare.comparison import compare_runs

        a, b = (Path(str(getattr(run, "folder", run))) for run in (run_a, run_b))
        return compare_runs(a, b, seed=seed)


sys.modules[__name__].__class__ = _CallableRoom
