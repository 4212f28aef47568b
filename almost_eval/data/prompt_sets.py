"""Prompt sets: the words of the evaluation prompts, ours or those of the official repository.

The official set is looked for in the data root, then in the cache, then downloaded from its pinned commit, and only
where a prompt of it is used. Its digest is in this file, so a changed copy is refused. Prompts are read as data:
nothing downloaded is run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import http.client
import json
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from almost_eval.data.sources import RAW, DataSource, keep, pinned_text
from almost_eval.errors import DataError, did_you_mean

PROMPT_SET_NAMES = {
    "official": "the words of the ALMoST repository, of lm-eval and of FastChat",
    "builtin": "our own wording of the same protocols",
}

_OFFICIAL_REPOSITORY = "naver-ai/ALMoST"
_OFFICIAL_COMMIT = "4ed89fa94a55a1cafd28234ce9da4320d79fb796"
_OFFICIAL_URL = f"{RAW}/{_OFFICIAL_REPOSITORY}/{_OFFICIAL_COMMIT}/eval/eval_prompt.py"
_OFFICIAL_DIGEST = "fc51811fbb429d23a2a8c03e05e775b4af1a11fa5abbb06ce4e96e231b83ba9f"
"""sha256 over the official evaluation prompts as canonical JSON: the mirror holds them as JSON, the repository as
string constants of a Python file, and both must come out the same."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Named prompts in the dialogue format, with `{placeholders}`."""

    name: str
    digest: str
    """sha256 of the prompts as canonical JSON."""
    read: Callable[[], Mapping[str, str]]
    """Gives them; the official ones are looked for when the first is wanted, and many protocols want none."""

    @classmethod
    def of(cls, name: str, prompts: Mapping[str, str]) -> PromptSet:
        """A set of prompts that are at hand."""
        return cls(name, _digest(prompts), lambda: prompts)

    @property
    def prompts(self) -> Mapping[str, str]:
        """All of them, by name.

        Raises:
            DataError: an official set that cannot be had or is not the pinned one.
        """
        return self.read()


def _digest(prompts: Mapping[str, str]) -> str:
    canonical = json.dumps(dict(prompts), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_prompt_set(name: str, data: DataSource) -> PromptSet:
    """The evaluation prompts: `static_HHH_prompt` and `truthfulQA_prompt`; `builtin` has its own shots as well.

    Raises:
        DataError: an unknown name. What is wrong with an official set is told when its first prompt is read.
    """
    if name == "builtin":
        text = (Path(__file__).parent / "prompts" / "builtin.json").read_text(encoding="utf-8")
        return PromptSet.of("builtin", json.loads(text))
    if name != "official":
        raise DataError(f"unknown prompt set {name!r}; {did_you_mean(name, PROMPT_SET_NAMES)}")
    return PromptSet("official", _OFFICIAL_DIGEST, functools.cache(lambda: _pinned_prompts(data)))


def _pinned_prompts(data: DataSource) -> dict[str, str]:
    prompts, origin = _official_prompts(data)
    if (digest := _digest(prompts)) != _OFFICIAL_DIGEST:
        raise DataError(
            f"{origin} does not hold the official prompts of {_OFFICIAL_REPOSITORY}@{_OFFICIAL_COMMIT[:7]} (sha256 "
            f"{digest[:12]}, expected {_OFFICIAL_DIGEST[:12]}); remove that copy, or use --prompt-set builtin"
        )
    return prompts


def _official_prompts(data: DataSource) -> tuple[dict[str, str], str]:
    """The prompts, and the file or address they came from. Not checked yet."""
    from almost_eval.nano.data import cache_dir

    mirror = f"github/{_OFFICIAL_REPOSITORY}/eval/eval_prompt.json"
    cached = cache_dir() / mirror
    candidates = ([data.root / mirror] if data.root else []) + [cached]
    for file in candidates:
        if file.is_file():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                return {str(key): str(value) for key, value in stored.items()}, str(file)
            except (ValueError, AttributeError, OSError) as error:
                raise DataError(f"{file} is not the JSON of a prompt set: {error}") from None
    try:
        with urllib.request.urlopen(_OFFICIAL_URL, timeout=20) as reply:
            tree = ast.parse(reply.read(1 << 20).decode("utf-8"))
    except SyntaxError:
        raise DataError(
            f"{_OFFICIAL_URL} gave no Python file (a proxy's page?); pass --data-root DIR with DIR/{mirror}, or use "
            "--prompt-set builtin"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        raise DataError(
            f"the official prompt set is not in the data root or the cache, and its download failed ({error}); pass "
            f"--data-root DIR with DIR/{mirror}, or use --prompt-set builtin"
        ) from None
    prompts = {
        statement.targets[0].id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }
    if _digest(prompts) == _OFFICIAL_DIGEST:  # never cache what would be refused
        keep(cached, json.dumps(prompts, indent=1).encode())
    return prompts, _OFFICIAL_URL


def official_text(path: str, sha256: str, data: DataSource) -> str:
    """A text file of the official repository at its pinned commit; see `pinned_text`."""
    return pinned_text(_OFFICIAL_REPOSITORY, _OFFICIAL_COMMIT, path, sha256, data, instead="use --prompt-set builtin")
