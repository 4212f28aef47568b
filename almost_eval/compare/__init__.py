"""What two or more runs say together: is B better than A, do engines agree, what did alignment cost. Uses `run`. Start
with `comparison`.

`almost_eval.compare(a, b)` is a function of the package, and this room bears its name: importing anything of the room
makes `almost_eval.compare` the module. So the module can be called, and both are the same to a program.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, run_a: Any, run_b: Any, *, seed: int = 0) -> Any:
        """See `almost_eval.api.compare`."""
        from almost_eval import api

        return api.compare(run_a, run_b, seed=seed)


sys.modules[__name__].__class__ = _CallableRoom
