"""The model card: `README.md` of every checkpoint that a stage saves, as the Hugging Face hub reads it.

Its head is YAML (base model, licence, tags, `model-index` with the stage's figures); below stand all figures, the
inputs by their digests, and the settings. It holds no path and no time: the same stage writes the same card anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from almost_eval import __version__
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATA_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::[\w.-]+)?(?:@\w+)?")
BASES = ("model", "policy")
"""Inputs of a stage that a checkpoint is made of: one of them is the base model."""
MODELS = (*BASES, "reward_model")
"""Inputs that are no data."""
PAPER = "arXiv 2305.13735"


@dataclass(frozen=True, slots=True)
class StageCard:
    """What the card of a stage's checkpoint says."""

    what: str
    """One sentence."""
    task: str
    """The hub's name of the task."""
    figures: Mapping[str, tuple[str, str]]
    """Path of a metric in `result.json` -> (the hub's type of metric, its name) for `model-index`."""


_HELD_OUT = {"held_out/loss": ("loss", "loss on held-out rows")}
_SAMPLED = {
    "reward_last": ("reward", "mean reward of sampled answers, raw logit, last tenth of the steps"),
    "kl_last": ("kl", "KL to the policy before, nats an answer, last tenth of the steps"),
    "length_last": ("length", "tokens of an answer, last tenth of the steps"),
}
STAGES: Mapping[str, StageCard] = {
    "reward": StageCard(
        "A reward model: one label, raw logits, higher is better. Trained on preference pairs (Bradley-Terry).",
        "text-classification",
        {
            "eval/accuracy/value": ("accuracy", "accuracy on held-out pairs"),
            "eval/accuracy_chosen_shorter/value": ("accuracy", "accuracy where the chosen answer is the shorter"),
            "eval/longer_wins/value": ("accuracy", "what choosing the longer answer gets"),
            "eval/calibration_error": ("expected_calibration_error", "calibration error"),
        },
    ),
    "sft": StageCard("A policy, fine-tuned on demonstrations.", "text-generation", _HELD_OUT),
    "rlsf": StageCard(
        "A policy after reinforcement learning from the scores of a reward model.", "text-generation", _SAMPLED
    ),
    "dpo": StageCard(
        "A policy after direct preference optimisation (DPO) on preference pairs.",
        "text-generation",
        {**_HELD_OUT, "held_out/accuracy": ("accuracy", "held-out pairs whose chosen answer gained more")},
    ),
    "online_dpo": StageCard(
        "A policy after DPO on its own answers, of which a reward model chose.", "text-generation", _SAMPLED
    ),
}
"""Stage -> its card. A stage that is not here saves no checkpoint."""


def write_cards(
    folders: Mapping[Path, bool],
    spec: JSONObject,
    inputs: Mapping[str, Path | str],
    metrics: Mapping[str, object],
) -> None:
    """Write `README.md` into checkpoints of one stage.

    Args:
        folders: checkpoint -> whether the figures are its own. Folders that are absent or hold no checkpoint are left
            alone.
        spec: `stage.json`: stage, settings, digests of the inputs.
        inputs: the inputs themselves.
        metrics: of the stage.
    """
    card = STAGES.get(spec["stage"])
    if card is None:
        return
    for folder, own in folders.items():
        names = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
        if names:
            figures = list(_leaves(metrics)) if own else []
            text = _text(
                card, spec, inputs, figures, library="peft" if names[0].startswith("adapter") else "transformers"
            )
            (folder / CARD).write_text(text, encoding="utf-8")


def _text(
    card: StageCard, spec: JSONObject, inputs: Mapping[str, Path | str], figures: list[tuple[str, object]], library: str
) -> str:
    stage: str = spec["stage"]
    base = next((inputs[name] for name in BASES if name in inputs), "")
    head = _head(card, stage, base, inputs, dict(figures), library).to_yaml()
    parts = [
        f"---\n{head}\n---\n\n# {stage.replace('_', ' ')}\n\n{card.what} Made by `almost-train "
        f"{stage.replace('_', '-')}` of the ALMoST Toolkit {__version__}, after the method of {PAPER}.",
        _table("Figures", "figure", "value", figures),
        _table("Data", "input", "content", [(name, _named(name, spec, inputs)) for name in inputs]),
        _table("Settings", "setting", "value", list(_leaves(spec["settings"]))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(
    card: StageCard, stage: str, base: Path | str, inputs: Mapping[str, Path | str], figures: JSONObject, library: str
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    known = _known_of(base)
    data = [value for name, value in inputs.items() if name not in MODELS and isinstance(value, str)]
    return ModelCardData(
        base_model=known.get("base_model"),
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        library_name=library,
        pipeline_tag=card.task,
        tags=["almost-toolkit", stage.replace("_", "-")],
        datasets=list(dict.fromkeys(match[1] for value in data if (match := _DATA_ID.fullmatch(value)))) or None,
        model_name=stage,
        eval_results=_results(card, inputs, figures) or None,
    )


def _results(card: StageCard, inputs: Mapping[str, Path | str], figures: JSONObject) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    name = next((key for key in inputs if key not in MODELS), "data")
    return [
        EvalResult(
            task_type=card.task,
            dataset_type="local" if isinstance(inputs.get(name), Path) else str(inputs.get(name)),
            dataset_name=name.replace("_", " "),
            metric_type=kind,
            metric_name=words,
            metric_value=figures[path],
        )
        for path, (kind, words) in card.figures.items()
        if isinstance(figures.get(path), int | float)
    ]


def _known_of(base: Path | str) -> dict[str, Any]:
    """The base model's hub id and licence, as far as they are known here: of a local checkpoint, what its card says."""
    folder: Path | None = base if isinstance(base, Path) else None
    known: dict[str, Any] = {}
    if isinstance(base, str) and _HUB_ID.fullmatch(base):
        known["base_model"] = base
        folder = _cached(base)
    if folder is None:
        return known
    head = card_head(folder)
    names = ("license", "license_name", "license_link", *(() if known else ("base_model",)))
    return known | {name: head[name] for name in names if head.get(name)}


def card_head(folder: Path) -> JSONObject:
    """The YAML at the head of a checkpoint's card; {} where there is none that can be read."""
    import yaml

    file = folder / CARD
    try:
        parts = file.read_text(encoding="utf-8").split("---", 2)
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}


def _cached(hub_id: str) -> Path | None:
    """The folder of a hub model that has been downloaded."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(hub_id, "config.json")
    return Path(file).parent if isinstance(file, str) else None


# --- Markdown ---


def _named(name: str, spec: JSONObject, inputs: Mapping[str, Path | str]) -> str:
    from almost_eval.nano import SHIPPED, shipped

    value = inputs[name]
    if isinstance(value, str):
        return value
    built_in = next((f"{known}, " for known in SHIPPED if shipped(known) == value), "")
    return f"{built_in}sha256 {spec['inputs'][name][:16]}"


def _table(title: str, first: str, second: str, rows: list[tuple[str, object]]) -> str:
    if not rows:
        return ""
    lines = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in rows)
    return f"## {title}\n\n| {first} | {second} |\n| --- | --- |\n{lines}".rstrip("\n")


def _cell(value: object) -> str:
    """As code: what a file or a setting holds is no Markdown."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""


def _leaves(value: object, at: str = "") -> Iterator[tuple[str, object]]:
    """Numbers, texts and truths of nested objects, by path: `eval/accuracy/value`. Lists are one text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{at}/{key}" if at else str(key))
    elif isinstance(value, list):
        if value:
            yield at, ", ".join(repr(item) if isinstance(item, str) else str(item) for item in value)
    elif value is not None and not (isinstance(value, float) and not math.isfinite(value)):
        yield at, value
