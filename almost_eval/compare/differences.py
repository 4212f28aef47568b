"""In what two runs differ, besides the model: by their specs, which hold everything that decides a number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from almost_eval.run.store import flat
from almost_eval.tasks.registry import stated_by

MODEL = frozenset(
    {"model_name", "architecture", "weight_digest", "engine.model", "engine.base_url", "settings.answers_digest"}
)
"""What is compared: two models may differ in these, and in what they answer."""
NO_SETTING = frozenset({"schema", "command", "template.text", "template_asked", "task", "protocol", "requires"})
"""Keys that say nothing more: the digest says it of a template's text; task and protocol must be the same."""
_ALIKE_MODELS = ("settings.systems.model.", "engine.adapter.", "model_files.adapter_config.json")
"""Beginnings of keys of a judged model, or an adapter: what makes its answers is compared, as `MODEL` is."""
_OF_ADAPTER = "model_files.adapter/"
_UNSET = "not set"


def measure_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a metric the one it is, beside task and protocol; runs that differ here measure something else."""
    settings = spec.get("settings") or {}
    stated = stated_by(str(spec.get("task"))).task_settings
    measure = {f"settings.{s.name}": settings.get(s.name, s.default) for s in stated if s.changes_metric}
    versions = settings.get("versions") or {}  # of the tasks of another harness
    return {
        "task_version": spec.get("task_version"),
        "requires": spec.get("requires"),
        **measure,
        **{f"settings.versions.{name}": version for name, version in versions.items()},
    }


def protocol_parts(task: str, protocol: str) -> tuple[str, ...]:
    """What a protocol lists (`mc2+mc1`), in one order; one of a task that takes no list of names is its only part."""
    takes_names = any(setting.kind == "names" for setting in stated_by(task).task_settings)
    return tuple(sorted(protocol.split("+"))) if takes_names else (protocol,)


def other_measure(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """The first thing by which the metrics of two specs are not the same, in words; None where they are."""
    of_a, of_b = measure_of(a), measure_of(b)
    for key in of_a.keys() & of_b.keys():
        if of_a[key] != of_b[key] and None not in (of_a[key], of_b[key]):
            return f"{key}: {shown(of_a[key])} in A, {shown(of_b[key])} in B"
    return None


def setting_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Every setting in which two specs differ, as `engine.dtype: float32 in A, bfloat16 in B`; digests come last."""
    if not a or not b:  # a spec that is not there says nothing
        return []
    lists = [f"settings.{s.name}" for s in stated_by(str(a.get("task"))).task_settings if s.kind == "names"]
    flat_a, flat_b = flat(a), flat(b)
    of_a, of_b = _as_read(flat_a, lists), _as_read(flat_b, lists)
    keys = [
        key
        for key in {**of_a, **of_b}
        if of_a.get(key) != of_b.get(key) and key not in MODEL | NO_SETTING and not key.startswith(_ALIKE_MODELS)
    ]
    if any(flat_a.get(key) != flat_b.get(key) for key in lists):  # of prompts in their order, which is the lists'
        keys = [key for key in keys if key != "prompt_ids_digest"]
    keys.sort(key=lambda key: "digest" in key or "fingerprint" in key)
    return [f"{key}: {shown(of_a.get(key))} in A, {shown(of_b.get(key))} in B" for key in keys]


def _as_read(values: Mapping[str, Any], lists: Sequence[str]) -> dict[str, Any]:
    """Without what changes nothing that is read.

    An adapter's own tokenizer and template are read in the place of its base's: the same key, whichever it is. And a
    list of names (`lists` are the keys of such) may have any order.
    """
    values = {k: sorted(v) if k in lists and isinstance(v, list) else v for k, v in values.items()}
    own = {f"model_files.{k.removeprefix(_OF_ADAPTER)}": v for k, v in values.items() if k.startswith(_OF_ADAPTER)}
    return {key: value for key, value in values.items() if not key.startswith(_OF_ADAPTER)} | own


def shown(value: Any) -> str:
    """A value in few words: a long digest is told by its first digits."""
    if value is None:
        return _UNSET
    if isinstance(value, dict) and value.get("name"):
        return f"{value['name']} ({shown(value.get('digest'))})" if value.get("digest") else str(value["name"])
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:12]
    return text if len(text) <= 80 else f"{text[:77]}..."
