"""JSON as the standard has it. Python's own reader also takes NaN and the infinities, and reads 1e999 as one of them.

Such a number passes every comparison with a bound, and is written again as something that no other program reads.
"""

from __future__ import annotations

import json
import math
from typing import Any


class NotJSON(ValueError):
    """A text is no JSON; the message is what is wrong with it."""


def read_json(text: bytes | bytearray | str) -> Any:
    """What a JSON text holds; of a field that stands twice, the second.

    Raises:
        NotJSON: it is none, or it is nested deeper or holds a longer number than Python can read.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise NotJSON(str(error)) from None
    except NotJSON:
        raise
    except (ValueError, RecursionError):
        raise NotJSON("it cannot be read") from None


def _no_number(word: str) -> float:
    raise NotJSON(f"{word} is no number of JSON's")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise NotJSON("a number is too large")
    return number
