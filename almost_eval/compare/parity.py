"""One model on several engines: do they give the same numbers? The answer is a certificate.

Every engine runs the same tasks into run folders of their own (so an interrupted certificate goes on), and each engine
is compared with the first, sample by sample: the same tokens were read, no prediction flips, and no log-likelihood
differs by more than the tolerance. A log-likelihood is the sum over a continuation's tokens, so it is compared as
such; the largest difference per token is told beside it.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from almost_eval.engines.build import EngineOptions, loglikelihood_engine
from almost_eval.errors import InputError, did_you_mean
from almost_eval.files import write_json
from almost_eval.progress import Progress
from almost_eval.run import provenance
from almost_eval.run.runner import RunRequest, open_run
from almost_eval.run.store import read_samples, read_spec
from almost_eval.tasks.registry import comparison_presets
from almost_eval.types import SampleRecord

ENGINES = ("hf", "vllm", "openai")
TOLERANCE = 1e-3
"""Nats that a log-likelihood may differ by, in float32."""
SERVE = "start one with: almost-serve policy --model {model}, and give --base-url http://127.0.0.1:PORT/v1"


@dataclass(slots=True)
class ParityRow:
    """One task on one engine, against the same task on the first."""

    task: str
    engine: str
    reference: str
    samples: int
    """Samples that both scored."""
    continuations: int = 0
    """Log-likelihoods that were compared."""
    largest_nats: float = 0.0
    """Largest difference between two log-likelihoods."""
    largest_per_token: float = 0.0
    """Largest difference divided by the continuation's tokens."""
    flips: list[str] = field(default_factory=list)
    """Samples with another prediction or another score."""
    problems: list[str] = field(default_factory=list)
    """Whatever else is not the same."""
    holds: bool = False


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was compared, on what, and whether it is the same."""

    model: str
    weight_digest: str | None
    tolerance: float
    holds: bool
    rows: tuple[ParityRow, ...]
    engines: Mapping[str, Any]
    """Engine -> its settings, of the runs' specs."""
    data: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: Sequence[str]
    commit: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The content of `certificate.json`."""
        return {"schema": 1, **asdict(self), "rows": [asdict(row) for row in self.rows]}


def machine() -> dict[str, Any]:
    """What ran it."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {"system": platform.system(), "cpu": cpu, "cores": os.cpu_count(), "devices": devices}


# --- what is run ---


@dataclass(frozen=True, slots=True)
class ParityPlan:
    """A certificate that is to be made."""

    base: RunRequest
    """Model, data, prompts and limit of every run; its engine is set for each."""
    engines: Sequence[str]
    """The first is what the others are compared with."""
    tasks: Sequence[str]
    dtype: str = "float32"
    base_url: str | None = None
    tolerance: float = TOLERANCE

    @property
    def model(self) -> str:
        """Checkpoint directory, hub id or built-in name."""
        return str(self.base.model)


def plan(
    base: RunRequest,
    *,
    engines: Sequence[str] = (),
    tasks: Sequence[str] = (),
    base_url: str | None = None,
    dtype: str = "float32",
    tolerance: float = TOLERANCE,
) -> ParityPlan:
    """A plan with every name checked.

    Raises:
        InputError: an unknown task or engine, fewer than two engines, or `openai` without an address.
        DataError: no such data.
    """
    chosen = list(dict.fromkeys(engines)) or ["hf", "vllm", *(["openai"] if base_url else [])]
    wanted = list(dict.fromkeys(tasks)) or list(comparison_presets())
    for names, known, what in ((chosen, ENGINES, "engine"), (wanted, comparison_presets(), "task")):
        if unknown := next((name for name in names if name not in known), None):
            raise InputError(f"unknown {what} {unknown!r}; {did_you_mean(unknown, known)}")
    if len(chosen) < 2:
        raise InputError(f"parity is between engines: give two or more of {', '.join(ENGINES)}")
    if "openai" in chosen and not base_url:
        raise InputError(f"the engine openai needs a served model; {SERVE.format(model=base.model)}")
    if base_url and "openai" not in chosen:
        raise InputError("--base-url belongs to the engine openai; name it in --engines")
    base.source()
    return ParityPlan(base, chosen, wanted, dtype=dtype, base_url=base_url, tolerance=tolerance)


def certify(plan: ParityPlan, folder: Path, progress: Progress | None = None) -> Certificate:
    """Run what is missing, compare, and store `certificate.json` in `folder`.

    Raises:
        InputError: whatever an engine refuses.
        RunError: see `Run.execute`.
    """
    progress = progress or Progress()
    began = time.perf_counter()
    engines = {name: _engine(plan, name) for name in plan.engines}  # what is refused is refused before anything runs
    for name in plan.engines:
        progress.note(f"{plan.model} on {name}")
        engine = engines.pop(name)
        try:
            for task in plan.tasks:
                preset = comparison_presets()[task]
                request = replace(plan.base, task=task, protocol=preset.protocol, settings=preset.settings)
                open_run(request, engine).execute(folder / f"{task}-{name}", progress)
        finally:
            if hasattr(engine, "close"):
                engine.close()  # two models need not share the memory
    reference, *others = plan.engines
    rows = [_compare(folder, task, name, reference, plan.tolerance) for task in plan.tasks for name in others]
    specs = {name: read_spec(folder / f"{plan.tasks[0]}-{name}") for name in plan.engines}
    certificate = Certificate(
        model=plan.model,
        weight_digest=specs[reference]["weight_digest"],
        tolerance=plan.tolerance,
        holds=all(row.holds for row in rows),
        rows=tuple(rows),
        engines={name: {**spec["engine"], "weight_digest": spec["weight_digest"]} for name, spec in specs.items()},
        data={"source": plan.base.source().name, "limit": plan.base.limit},
        machine=machine(),
        versions=provenance.versions(),
        command=provenance.command(),
        commit=provenance.commit(),
        seconds=round(time.perf_counter() - began, 1),
    )
    write_json(folder / "certificate.json", certificate.to_dict())
    return certificate


def _engine(plan: ParityPlan, name: str) -> Any:
    if name == "openai":
        options = EngineOptions("openai", base_url=plan.base_url, tokenizer=plan.model)
        engine: Any = loglikelihood_engine(_served_name(plan, options), options)
        engine.check_scores()
        return engine
    return loglikelihood_engine(plan.model, EngineOptions(name, dtype=plan.dtype))


def _served_name(plan: ParityPlan, options: EngineOptions) -> str:
    """The name under which the endpoint serves the checkpoint: its own, or the only one there is."""
    from almost_eval.engines.openai_client import OpenAIClient

    served = OpenAIClient(None, base_url=options.base_url).served_names()
    own = (plan.model, Path(plan.model).name)
    name = next((name for name in own if name in served), served[0] if len(served) == 1 else None)
    if name is None:
        raise InputError(f"the endpoint serves {', '.join(served) or 'no model'}, not {plan.model}; serve it alone")
    return name


# --- what is compared ---


def _compare(folder: Path, task: str, engine: str, reference: str, tolerance: float) -> ParityRow:
    mine, theirs = folder / f"{task}-{engine}", folder / f"{task}-{reference}"
    row = compare(
        {record.sample.id: record for record in read_samples(theirs)},
        {record.sample.id: record for record in read_samples(mine)},
        ParityRow(task, engine, reference, 0),
        tolerance,
    )
    was, now = read_spec(theirs), read_spec(mine)
    if was["prompt_ids_digest"] != now["prompt_ids_digest"]:
        row.problems.append(f"{engine} read other token ids than {reference}")
    if None not in (was["weight_digest"], now["weight_digest"]) and was["weight_digest"] != now["weight_digest"]:
        row.problems.append(f"{engine} has other weights than {reference}")
    return _judged(row, tolerance)


def compare(
    theirs: Mapping[str, SampleRecord], mine: Mapping[str, SampleRecord], row: ParityRow, tolerance: float = TOLERANCE
) -> ParityRow:
    """Fill `row` with what differs between two runs of one task."""
    if lonely := theirs.keys() ^ mine.keys():
        row.problems.append(f"{len(lonely)} samples are in one run alone, first {min(lonely)}")
    unscored = 0
    for id in sorted(theirs.keys() & mine.keys()):
        was, now = theirs[id], mine[id]
        if was.score.value is None or now.score.value is None:
            if (was.score.value, was.score.reason) != (now.score.value, now.score.reason):
                row.problems.append(f"sample {id}: {was.score.reason or 'scored'} against {now.score.reason}")
            unscored += 1
            continue
        row.samples += 1
        if _flipped(was, now, tolerance):
            row.flips.append(id)
        for nats, tokens in _gaps(was, now):
            row.continuations += 1
            row.largest_nats = max(row.largest_nats, nats)
            row.largest_per_token = max(row.largest_per_token, nats / tokens)
    if not row.samples:
        row.problems.append(f"nothing to compare: {unscored} samples without a score")
    if not math.isfinite(row.largest_nats):
        row.problems.append("log-likelihoods that do not pair: other lengths, or finite in one run alone")
        row.largest_nats = row.largest_per_token = 0.0  # infinity is no JSON
    return _judged(row, tolerance)


def _judged(row: ParityRow, tolerance: float) -> ParityRow:
    row.holds = not row.problems and not row.flips and row.largest_nats <= tolerance
    return row


def _gaps(was: SampleRecord, now: SampleRecord) -> Iterable[tuple[float, int]]:
    """(difference in nats, tokens) of every continuation; infinite where they do not pair."""
    one, other = was.outputs, now.outputs
    if one["n_tokens"] != other["n_tokens"]:
        return [(math.inf, 1)]
    rows = (one["loglikelihoods"], other["loglikelihoods"], one["n_tokens"])
    pairs = zip(*(chain.from_iterable(row) for row in rows), strict=True)
    return [(0.0 if a is b else math.inf if None in (a, b) else abs(a - b), n) for a, b, n in pairs]


def _flipped(was: SampleRecord, now: SampleRecord, tolerance: float) -> bool:
    """Another most likely answer, or another score; values within the tolerance of one another are the same."""
    one, other = was.outputs["loglikelihoods"], now.outputs["loglikelihoods"]
    if any(_best(a) != _best(b) for a, b in zip(one, other, strict=False)):
        return True
    values = [(was.score.value, now.score.value)]
    values += [(value, now.score.metrics.get(name)) for name, value in was.score.metrics.items()]
    return any(a is not b and (a is None or b is None or abs(a - b) > tolerance) for a, b in values)


def _best(row: Sequence[float | None]) -> int:
    return max(range(len(row)), key=lambda i: -math.inf if row[i] is None else row[i])  # type: ignore[return-value,arg-type]
