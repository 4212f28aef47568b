"""YAML files that a person writes: recipes, configurations, rankings. What YAML would take in silence is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import DataError
from almost_eval.files import not_text

if TYPE_CHECKING:
    from yaml import Node

_OTHER_NUMBER = re.compile(r"[-+]?0[0-7_]+|[-+]?\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?")
"""Numbers that YAML 1.1 reads in base 8 (010 is 8) or 60 (1:30 is 90), and hardly a person does."""
_MERGE = "tag:yaml.org,2002:merge"
"""The tag of the key `<<`, which may stand in a mapping several times."""


def read_yaml(file: Path, absent: str) -> object:
    """What a YAML file holds.

    Args:
        file: UTF-8, with or without a byte order mark.
        absent: the end of the error of a file that is not there: what it is for.

    Raises:
        DataError: absent or not YAML; a mapping with a key that stands there twice, of which YAML would take the last;
            an alias that holds itself; a number of base 8 or 60.
    """
    try:
        return yaml_value(file.read_bytes().decode("utf-8-sig"), str(file))
    except FileNotFoundError:
        raise DataError(f"{file} is not there; {absent}") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        cure = not_text(error.object)
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); {cure}") from None


def yaml_value(text: str, name: str) -> object:
    """What a YAML text holds; `name` is what an error calls it.

    Raises:
        DataError: as `read_yaml`.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_doubt(name, root, (), set())
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or number that there is not
        raise DataError(f"{name} is not YAML ({' '.join(str(error).split())})") from None


def _refuse_doubt(file: str, node: Node | None, above: tuple[int, ...], checked: set[int]) -> None:
    from yaml import MappingNode, ScalarNode, SequenceNode

    if isinstance(node, ScalarNode) and node.tag.endswith((":int", ":float")) and _OTHER_NUMBER.fullmatch(node.value):
        raise DataError(
            f"{file}, line {node.start_mark.line + 1}: YAML reads {node.value} as a number of base "
            f"{60 if ':' in node.value else 8}; write it in base 10, or a text in quotes"
        )
    if node is None or not isinstance(node, MappingNode | SequenceNode):
        return
    line = node.start_mark.line + 1
    if id(node) in above:
        raise DataError(f"{file}, line {line}: what the anchor there names holds itself; write it out")
    if id(node) in checked:  # aliases of aliases would be walked a number of times that grows with their depth
        return
    checked.add(id(node))
    above = (*above, id(node))
    if isinstance(node, SequenceNode):
        for item in node.value:
            _refuse_doubt(file, item, above, checked)
        return
    seen: set[object] = set()
    for key, value in node.value:
        _refuse_doubt(file, key, above, checked)
        name = (key.tag, str(key.value))
        if name in seen and key.tag != _MERGE:
            raise DataError(f"{file}, line {key.start_mark.line + 1}: {name[1]!r} stands there twice; keep one")
        seen.add(name)
        _refuse_doubt(file, value, above, checked)
